"""A format for each part of each layer, at equal bit operations.

FLIQS (https://arxiv.org/abs/2308.03290) searches a mix of integer and float
formats for the layers of a network by a policy's gradient, one decision a
layer. Here weights are not trained meanwhile: they are rounded to each format
once, and a point of the space picks among these. Beside methods of
`research.search` stand one format throughout, greedy steps, and the exact
optimum of what each decision costs by itself (an integer program).

Every point is brought to the same bit operations before it is judged, so that
methods differ in the loss alone. Shapes by axis letter: P decisions, C formats,
L layers of a stack, N batches, B rows, T tokens.
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
from ops.quantized import formats
from research.quantization import apply, structure
from research.quantization.recipes import OF_TOKENS, Recipe
from research.search import Genome, Product, Weighted, named, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The decisions of a model, and what they cost.

  Attributes:
    names: of the P decisions, such as "3.mlp".
    formats: names of C formats, by rising bits.
    bits: (C,) of their codes.
    macs: (P,) products and sums a token.
    input_bits: of what weights multiply.
    order: (P,) in which points are brought to a budget.
  """

  names: tuple[str, ...]
  formats: tuple[str, ...]
  bits: np.ndarray
  macs: np.ndarray
  input_bits: int
  order: np.ndarray

  @property
  def space(self) -> Product:
    """All points, of which few have any given cost."""
    return Product({name: self.formats for name in self.names})

  def cost(self, genome: Genome) -> float:
    """Bit operations a token: products times bits of both factors."""
    return float(self.macs @ self.bits[list(genome)]) * self.input_bits

  def budget(self, bits: float) -> float:
    """Bit operations a token of weights of so many bits throughout."""
    return float(self.macs.sum() * bits) * self.input_bits

  def brought(self, genome: Genome, budget: float) -> Genome:
    """The point with a budget kept, and no decision that could be wider.

    In a fixed order the widest decisions become narrower until the budget
    holds; then the narrowest become wider while it does.

    Raises:
      InputError: the narrowest formats are beyond the budget.
    """
    found = list(genome)
    if self.cost((0,) * len(found)) > budget * (1 + 1e-9):
      raise InputError(
        f"a budget of {budget:.4g} bit operations: {self.formats[0]} needs"
        " more throughout"
      )
    while self.cost(found) > budget * (1 + 1e-9):
      widest = max(found)
      found[next(at for at in self.order if found[at] == widest)] -= 1
    room = True
    while room:
      room = False
      for at in sorted(self.order, key=lambda at: found[at]):
        wider = [*found[:at], found[at] + 1, *found[at + 1 :]]
        if wider[at] < len(self.formats) and self.cost(wider) <= budget * (
          1 + 1e-9
        ):
          found, room = wider, True
          break
    return tuple(found)


class Mixed:
  """A model whose weights can be in any of some formats, each its own.

  Args:
    config: of the model.
    params: of the model, arrays.
    names: of formats.
    input_bits: of what weights multiply, for costs alone.
    seed: of the order in which points are brought to a budget.

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
    seed: int = 0,
  ):
    unknown = [name for name in names if name not in OF_TOKENS]
    if unknown or len(set(names)) < 2:
      raise InputError(
        f"formats={','.join(names)}: give two or more of {', '.join(OF_TOKENS)}"
      )
    of_bits = lambda name: formats.get(name).bits
    names = tuple(sorted(set(names), key=of_bits))
    self._config, self._params = config, params
    layers = language_model.layers_of(config)
    own = structure.unstacked(config, params)
    parts = [
      (number, part)
      for number, layer in enumerate(own)
      for part in dict.fromkeys(path[0] for path in structure.kernels(layer))
    ]
    sizes = [
      sum(
        structure.at(own[number], path)["kernel"].size
        for path in structure.kernels(own[number])
        if path[0] == part
      )
      for number, part in parts
    ]
    self.plan = Plan(
      names=tuple(f"{number}.{part}" for number, part in parts),
      formats=names,
      bits=np.asarray([of_bits(name) for name in names], np.float64),
      macs=np.asarray(sizes, np.float64),
      input_bits=input_bits,
      order=np.random.default_rng(seed).permutation(len(parts)),
    )
    self._at = {part: place for place, part in enumerate(parts)}
    self._stacks = list(dict.fromkeys(layer.stack for layer in layers))
    self._numbers = {
      stack: [n for n, layer in enumerate(layers) if layer.stack == stack]
      for stack in self._stacks
    }
    rounded = [self._rounded(name) for name in names]
    self._variants = [
      jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(structure.at(one, stack) for one in rounded),
      )
      for stack in self._stacks
    ]

  def _rounded(self, name: str) -> Params:
    """The model whose kernels are the nearest levels of a format."""
    recipe = Recipe(method="nearest", text=name, kernels=name)
    _, params = apply.quantize(self._config, self._params, recipe, None)
    return jax.jit(apply.as_arrays)(params)

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
  """Narrows the decision that loses least a bit operation, again and again.

  Args:
    plan: of the decisions.
    costs: (P, C) as `sensitivities` gives them.
    budget: bit operations a token.
  """
  found = [len(plan.formats) - 1] * len(plan.names)
  while plan.cost(found) > budget * (1 + 1e-9):
    each = [
      (costs[at, place - 1] - costs[at, place])
      / (plan.macs[at] * (plan.bits[place] - plan.bits[place - 1]))
      if place
      else np.inf
      for at, place in enumerate(found)
    ]
    at = int(np.argmin(each))
    if not found[at]:
      break
    found[at] -= 1
  return plan.brought(tuple(found), budget)


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
  spent = np.outer(plan.macs, plan.bits).ravel() * plan.input_bits / budget
  found = optimize.milp(
    costs.ravel(),
    constraints=[
      optimize.LinearConstraint(once, 1, 1),
      optimize.LinearConstraint(spent[None], ub=1 + 1e-9),
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
) -> Genome:
  """The best point that a method of `research.search` finds.

  Args:
    model: with its plan.
    batches: (N, B, T) that points are judged by.
    budget: bit operations a token, to which every point is brought.
    method: of `research.search.METHODS`; "reinforce" is FLIQS's.
    evaluations: at most.
    seed: of the method.
    advance: told of evaluations.
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
  return plan.brought(found.genomes[found.best(Weighted())], budget)


def uniform(plan: Plan, bits: float) -> Genome:
  """One format throughout, the last of so many bits.

  Raises:
    InputError: no format has so many.
  """
  places = np.flatnonzero(plan.bits == bits)
  if not len(places):
    raise InputError(
      f"bits={bits:g}: no format of {', '.join(plan.formats)} has so many"
    )
  return (int(places[-1]),) * len(plan.names)


def described(plan: Plan, genome: Genome) -> dict[str, Any]:
  """Formats by decision, and bits a weight."""
  bits = plan.macs @ plan.bits[list(genome)] / plan.macs.sum()
  names = {n: plan.formats[place] for n, place in zip(plan.names, genome)}
  return {"bits": float(bits), "formats": names}
