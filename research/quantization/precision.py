"""A format for each part of each layer, at equal bit operations.

FLIQS (https://arxiv.org/abs/2308.03290) searches a mix of integer and float
formats for the layers of a network by a policy's gradient, one decision a
layer. Here weights are not trained meanwhile: they are rounded to each format
once, and a point of the space picks among these. Beside methods of
`research.search` stand one format throughout, greedy steps, and the exact
optimum of what each decision costs by itself (an integer program).

Every point is brought to the same bit operations before it is judged, so that
methods differ in the loss alone. Bits of a weight are true ones: scales, zero
points and choices of blocks count. Shapes by axis letter: P decisions, C
formats, L layers of a stack, N batches, B rows, T tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import language_model
from models.errors import InputError
from models.module import Params
from research.cost import sizes
from research.quantization import apply, structure
from research.quantization.recipes import OF_TOKENS, Recipe
from research.search import Genome, Product, Weighted, named, run

# A share of a budget, by which sums of floats may be beyond it.
_SLACK = 1 + 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The decisions of a model, and what they cost.

  Attributes:
    names: of the P decisions, such as "3.mlp".
    formats: names of C formats, by rising bits of the model.
    bits: (P, C) a weight, with scales, zero points and choices. Formats may be
      equal, and their order may differ between decisions.
    macs: (P,) products and sums a token.
    input_bits: of what weights multiply.
  """

  names: tuple[str, ...]
  formats: tuple[str, ...]
  bits: np.ndarray
  macs: np.ndarray
  input_bits: int

  @property
  def space(self) -> Product:
    """All points, of which few have any given cost."""
    return Product({name: self.formats for name in self.names})

  @property
  def costs(self) -> np.ndarray:
    """Bit operations a token of each decision in each format, (P, C)."""
    return self.macs[:, None] * self.bits * self.input_bits

  def cost(self, genome: Genome) -> float:
    """Bit operations a token: products times bits of both factors."""
    return float(self.costs[range(len(genome)), list(genome)].sum())

  def check(self, budget: float) -> None:
    """Raises InputError where the narrowest formats are beyond a budget."""
    if self.costs.min(1).sum() > budget * _SLACK:
      raise InputError(
        f"a budget of {budget:.4g} bit operations: the narrowest formats need"
        " more throughout"
      )

  def brought(self, genome: Genome, budget: float) -> Genome:
    """The point with a budget kept, and no decision that could be wider.

    Random decisions become narrower by one step until the budget holds; then
    random ones become wider by one step while it does. A step leads to the
    next number of bits, of equal formats to a random one. What is random
    depends on the genome alone. Steps in a fixed order, or at the widest and
    the narrowest decision first, would lead most points to the same few.

    Raises:
      InputError: the narrowest formats are beyond the budget.
    """
    self.check(budget)
    costs, found = self.costs, list(genome)
    rng = np.random.default_rng(found)
    while self.cost(found) > budget * _SLACK:
      steps = [_next(costs[at], place, -1) for at, place in enumerate(found)]
      _take(found, steps, rng)
    while True:
      room = budget * _SLACK - self.cost(found)
      steps = [
        [
          wider
          for wider in _next(costs[at], place, 1)
          if costs[at, wider] - costs[at, place] <= room
        ]
        for at, place in enumerate(found)
      ]
      if not any(steps):
        return tuple(found)
      _take(found, steps, rng)


def _next(costs: np.ndarray, place: int, sign: int) -> list[int]:
  """Places of the formats that cost (C,) next more (1) or less (-1)."""
  beyond = sign * (costs - costs[place])
  if not (beyond > 0).any():
    return []
  return np.flatnonzero(beyond == beyond[beyond > 0].min()).tolist()


def _take(found: list[int], steps: list[list[int]], rng) -> None:
  """Takes one of the steps that decisions have, all decisions alike likely."""
  at = rng.choice([at for at, places in enumerate(steps) if places])
  found[at] = int(rng.choice(steps[at]))


class Mixed:
  """A model whose weights can be in any of some formats, each its own.

  Args:
    config: of the model.
    params: of the model, arrays.
    names: of formats.
    input_bits: of what weights multiply, for costs alone.

  Raises:
    InputError: there are fewer than two formats, or one is not known.
  """

  def __init__(
    self,
    config: language_model.Config,
    params: Params,
    names: Sequence[str],
    *,
    input_bits: int = 16,
  ):
    unknown = [name for name in names if name not in OF_TOKENS]
    if unknown or len(set(names)) < 2:
      raise InputError(
        f"formats={','.join(names)}: give two or more of {', '.join(OF_TOKENS)}"
      )
    self._config, self._params = config, params
    layers = language_model.layers_of(config)
    own = structure.unstacked(config, params)
    parts = [
      (number, part)
      for number, layer in enumerate(own)
      for part in dict.fromkeys(path[0] for path in structure.kernels(layer))
    ]
    self._at = {part: place for place, part in enumerate(parts)}
    self._stacks = list(dict.fromkeys(layer.stack for layer in layers))
    self._numbers = {
      stack: [n for n, layer in enumerate(layers) if layer.stack == stack]
      for stack in self._stacks
    }
    macs = self._per_part(params, lambda kernel: kernel.size)
    kept = {name: self._kept(name) for name in dict.fromkeys(names)}
    bits = {
      name: 8 * self._per_part(one, sizes.kept_bytes) / macs
      for name, one in kept.items()
    }
    # Sorting keeps formats of equal bits in the order that they are given in.
    names = tuple(sorted(kept, key=lambda name: macs @ bits[name]))
    self.plan = Plan(
      names=tuple(f"{number}.{part}" for number, part in parts),
      formats=names,
      bits=np.stack([bits[name] for name in names], axis=1),
      macs=macs,
      input_bits=input_bits,
    )
    rounded = [jax.jit(apply.as_arrays)(kept.pop(name)) for name in names]
    self._variants = [
      jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(structure.at(one, stack) for one in rounded),
      )
      for stack in self._stacks
    ]

  def _kept(self, name: str) -> Params:
    """The model whose kernels are kept in a format, the nearest levels."""
    recipe = Recipe(method="nearest", text=name, kernels=name)
    return apply.quantize(self._config, self._params, recipe, None)[1]

  def _per_part(
    self, params: Params, count: Callable[[Any], int]
  ) -> np.ndarray:
    """Sums over the kernels of each decision, (P,), layers of a stack alike."""
    found = np.zeros(len(self._at))
    for stack in self._stacks:
      whole = structure.at(params, stack)
      for path in structure.kernels(whole):
        each = count(structure.at(whole, path)["kernel"])
        for number in self._numbers[stack]:
          found[self._at[number, path[0]]] += each / len(self._numbers[stack])
    return found

  def losses(self, genome: Genome, batches: np.ndarray) -> np.ndarray:
    """Nats a token of each row, (N, B), of a point.

    Args:
      genome: places of formats.
      batches: (N, B, T) int32.
    """
    choices = []
    for stack, variants in zip(self._stacks, self._variants):
      numbers = self._numbers[stack]
      choices.append(
        {
          part: jnp.asarray(
            [genome[self._at[number, part]] for number in numbers], jnp.int32
          )
          for part in variants
          if (numbers[0], part) in self._at
        }
      )
    found = _losses(
      self._config,
      tuple(self._stacks),
      self._params,
      self._variants,
      choices,
      jnp.asarray(batches),
    )
    return np.asarray(found, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(config, stacks, params, variants, choices, batches):
  """One program for all points: each layer takes its slice."""
  for stack, whole, chosen in zip(stacks, variants, choices):
    own = {}
    for part, leaves in whole.items():
      if part not in chosen:
        own[part] = jax.tree.map(lambda leaf: leaf[0], leaves)
        continue
      places = chosen[part], jnp.arange(chosen[part].shape[0])
      take = lambda leaf, places=places: leaf[places]
      own[part] = jax.tree.map(take, leaves)
    params = structure.put(params, stack, own)

  def of_batch(tokens):
    hidden = language_model.hidden_states(config, params, tokens[:, :-1])
    scores = language_model.logits(config, params, hidden)
    scores = jax.nn.log_softmax(scores)
    taken = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)
    return -jnp.mean(taken[..., 0], axis=-1)

  return jax.lax.map(of_batch, batches)


def sensitivities(
  model: Mixed,
  batches: np.ndarray,
  advance: Callable[[int], None] | None = None,
) -> np.ndarray:
  """What each decision costs by itself, (P, C) nats a token.

  The loss with one decision in a format and the others in the widest one, less
  that with all in the widest: 1 + P (C - 1) evaluations.
  """
  plan = model.plan
  widest = (len(plan.formats) - 1,) * len(plan.names)
  base = model.losses(widest, batches).mean()
  found = np.zeros((len(plan.names), len(plan.formats)))
  for at in range(len(plan.names)):
    for place in range(len(plan.formats) - 1):
      point = [*widest[:at], place, *widest[at + 1 :]]
      found[at, place] = model.losses(tuple(point), batches).mean() - base
    if advance is not None:
      advance(1)
  return found


def greedy(plan: Plan, costs: np.ndarray, budget: float) -> Genome:
  """Narrows what loses least a bit operation, again and again.

  It begins with the widest formats. What is left of the budget then widens what
  gains most a bit operation. Of equal formats the one of less cost is taken.

  Args:
    plan: of the decisions.
    costs: (P, C) as `sensitivities` gives them.
    budget: bit operations a token.

  Raises:
    InputError: nothing is within the budget.
  """
  plan.check(budget)
  spent, rows = plan.costs, np.arange(len(costs))
  widest = spent == spent.max(1, keepdims=True)
  found = np.where(widest, costs, np.inf).argmin(1)
  while plan.cost(found) > budget * _SLACK:
    more, lost = (own - own[rows, found][:, None] for own in (spent, costs))
    options = np.argwhere(more < 0)
    each = [lost[one] / -more[one] for one in map(tuple, options)]
    at, place = options[np.argmin(each)]
    found[at] = place
  while True:
    more, lost = (own - own[rows, found][:, None] for own in (spent, costs))
    room = budget * _SLACK - plan.cost(found)
    options = np.argwhere((more > 0) & (more <= room) & (lost < 0))
    if not len(options):
      return tuple(map(int, found))
    each = [lost[one] / more[one] for one in map(tuple, options)]
    at, place = options[np.argmin(each)]
    found[at] = place


def exact(plan: Plan, costs: np.ndarray, budget: float) -> Genome:
  """The point of the least sum of costs within a budget (mixed integers).

  Args:
    plan: of the decisions.
    costs: (P, C) as `sensitivities` gives them.
    budget: bit operations a token.

  Raises:
    InputError: nothing is within the budget.
  """
  from scipy import optimize  # Takes long to import.

  count, choices = costs.shape
  once = np.kron(np.eye(count), np.ones(choices))
  spent = plan.costs.ravel() / budget
  found = optimize.milp(
    costs.ravel(),
    constraints=[
      optimize.LinearConstraint(once, 1, 1),
      optimize.LinearConstraint(spent[None], ub=_SLACK),
    ],
    integrality=np.ones(costs.size),
    bounds=optimize.Bounds(0, 1),
  )
  if found.x is None:
    raise InputError(f"a budget of {budget:.4g}: no point is within it")
  taken = found.x.reshape(costs.shape).argmax(1)
  return tuple(map(int, taken))


def searched(
  model: Mixed,
  batches: np.ndarray,
  budget: float,
  method: str,
  *,
  evaluations: int,
  seed: int = 0,
  advance: Callable[[int], None] | None = None,
) -> tuple[Genome, int]:
  """The best point that a method of `research.search` finds.

  Args:
    model: with its plan.
    batches: (N, B, T) that points are judged by.
    budget: bit operations a token, to which every point is brought.
    method: of `research.search.METHODS`; "reinforce" is FLIQS's.
    evaluations: of genomes, some of which are brought to the same point.
    seed: of the method.
    advance: told of evaluations.

  Returns:
    The point, and how many losses were computed: one a point.

  Raises:
    InputError: the narrowest formats are beyond the budget.
  """
  plan, known = model.plan, {}

  def judge(genomes):
    values = []
    for genome in genomes:
      point = plan.brought(genome, budget)
      if point not in known:
        known[point] = float(model.losses(point, batches).mean())
      values.append(known[point])
    return np.nan_to_num(values, nan=np.inf, posinf=np.inf)

  found = run(
    plan.space,
    judge,
    named(method),
    budget=evaluations,
    seed=seed,
    preference=Weighted(),
    objectives=("loss",),
    advance=advance,
  )
  best = found.genomes[found.best(Weighted())]
  return plan.brought(best, budget), len(known)


def uniform(plan: Plan, name: str) -> Genome:
  """One format throughout.

  Raises:
    InputError: it is none of the plan's.
  """
  if name not in plan.formats:
    raise InputError(f"uniform={name}: give one of {', '.join(plan.formats)}")
  return (plan.formats.index(name),) * len(plan.names)


def described(plan: Plan, genome: Genome) -> dict[str, Any]:
  """Formats by decision, and bits a weight, all that is kept included."""
  bits = plan.cost(genome) / plan.input_bits / plan.macs.sum()
  names = {n: plan.formats[place] for n, place in zip(plan.names, genome)}
  return {"bits": float(bits), "formats": names}
