"""Expected values over a grid of numbers, and losses of them.

The mean of a model's distribution by exact probabilities instead of draws: the
grid's numbers are scored in one pass and their probabilities renormalised over
it, E[s(y)] = sum_g s_g softmax(log p(g | x))_g (Lukasik et al. 2024,
"Regression-aware inference with LLMs", section 4). It has a gradient.

Shapes by axis letter: B examples, T target tokens, O objectives, G numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from models.numbers import TargetCodec
from models.regression_lm import Memory, Params
from research.regression_lm import likelihood
from research.regression_lm.likelihood import Model
from research.regression_lm.options import SCALES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
  """Numbers that stand for a distribution, for each objective.

  Attributes:
    ids: (O, G, tokens of a number) int32 of the decoder's vocabulary.
    scores: (O, G) float32, what each is worth; NaN where an objective has
      fewer numbers, and the entry counts for nothing.
  """

  ids: jax.Array
  scores: jax.Array


@dataclasses.dataclass(frozen=True)
class Scale:
  """Maps targets to scores: standardised values, or ranks in [0, 1].

  Attributes:
    kind: "value" or "rank".
    known: for each objective the sorted finite targets of training.
  """

  kind: str
  known: tuple[np.ndarray, ...]

  @classmethod
  def fit(cls, kind: str, values: np.ndarray) -> "Scale":
    """From training targets (examples, O), NaN where missing.

    Raises:
      InputError: the kind is unknown, or an objective has no finite target.
    """
    if kind not in SCALES:
      raise InputError(f"scale {kind!r} is unknown: take one of {SCALES}")
    known = tuple(np.sort(v[np.isfinite(v)]) for v in values.T)
    for place, column in enumerate(known):
      if not len(column):
        raise InputError(f"objective {place} has no finite target to learn")
    return cls(kind, known)

  def scores(self, values: np.ndarray) -> np.ndarray:
    """float32 scores (..., O) of values (..., O); NaN where not finite."""
    found = np.full(values.shape, np.nan, np.float32)
    for place, known in enumerate(self.known):
      column = values[..., place]
      if self.kind == "value":
        spread = known.std() or 1.0
        mapped = (column - known.mean()) / spread
      else:
        low = np.searchsorted(known, column, "left")
        high = np.searchsorted(known, column, "right")
        mapped = (low + high) / (2 * len(known))
      found[..., place] = np.where(np.isfinite(column), mapped, np.nan)
    return found

  def values(self, scores: np.ndarray) -> np.ndarray:
    """The values (..., O) that have scores (..., O), within what is known."""
    found = np.empty(scores.shape, np.float64)
    for place, known in enumerate(self.known):
      column = np.asarray(scores[..., place], np.float64)
      if self.kind == "value":
        found[..., place] = column * (known.std() or 1.0) + known.mean()
      else:
        ranks = (np.arange(len(known)) + 0.5) / len(known)
        found[..., place] = np.interp(column, ranks, known)
    return found

  def grid(self, codec: TargetCodec, size: int) -> Grid:
    """Grid of the quantiles of the training targets, as the codec rounds them.

    Args:
      codec: of the targets.
      size: G; an objective with fewer different numbers has them all. Each
        spelling of zero takes an entry.
    """
    width = codec.format.length
    rows, values = [], []
    for known in self.known:
      written = codec.encode([[value] for value in known])
      rounded = codec.values(written)[:, 0]
      more = len(codec.zeros) - 1 if (rounded == 0).any() else 0
      chosen = _quantiles(rounded, max(size - more, 1))
      own, numbers = written[chosen, :width], rounded[chosen]
      if (numbers == 0).any():
        # The probability of zero is that of all its spellings.
        own = np.concatenate([own[numbers != 0], codec.zeros])
        zeros = np.zeros(len(codec.zeros))
        numbers = np.concatenate([numbers[numbers != 0], zeros])
      rows.append(own)
      values.append(numbers)
    shape = (codec.num_objectives, max(size, *map(len, rows)))
    ids = np.ones((*shape, width), np.int32)
    scores = np.full(shape, np.nan, np.float32)
    for place, (own, numbers) in enumerate(zip(rows, values)):
      ids[place, : len(own)] = own
      column = np.full((len(own), codec.num_objectives), np.nan)
      column[:, place] = numbers
      scores[place, : len(own)] = self.scores(column)[:, place]
    # Entries without weight repeat the first, because they are read too.
    unused = np.isnan(scores)
    ids = np.where(unused[..., None], ids[:, :1], ids)
    return Grid(ids=ids, scores=scores)


def _quantiles(values: np.ndarray, size: int) -> np.ndarray:
  """Indices of at most `size` different entries of sorted `values`."""
  _, first = np.unique(values, return_index=True)
  if len(first) <= size:
    return first
  at = np.round(np.linspace(0, len(values) - 1, size)).astype(int)
  chosen = np.unique(np.searchsorted(values, values[at], "left"))
  others = np.setdiff1d(first, chosen)
  fill = np.linspace(0, len(others) - 1, size - len(chosen)).astype(int)
  return np.sort(np.concatenate([chosen, others[fill]]))


def grid_logprobs(
  model: Model, params: Params, memory: Memory, targets: jax.Array, grid: Grid
) -> jax.Array:
  """Log-probability (B, O, G) of the grid's numbers for each objective.

  Each is given the text and the objectives before it as in `targets` (B, T).
  """
  codec = model.codec
  width = codec.format.length
  found = []
  for place in range(codec.num_objectives):
    ids = grid.ids[place]
    shape = (targets.shape[0], *ids.shape)
    before = jnp.broadcast_to(
      targets[:, None, : place * width], (*shape[:2], place * width)
    )
    rows = jnp.concatenate([before, jnp.broadcast_to(ids[None], shape)], -1)
    # Nothing behind the objective is read; passes of one length compile once
    # for each objective.
    logprobs, _ = likelihood.token_logprobs(model, params, memory, rows)
    found.append(logprobs[..., place * width :].sum(-1))
  return jnp.stack(found, axis=1)


def scores(
  model: Model, params: Params, memory: Memory, targets: jax.Array, grid: Grid
) -> jax.Array:
  """Expected scores (B, O); arguments as of `grid_logprobs`."""
  there = jnp.isfinite(grid.scores)[None]
  logprobs = grid_logprobs(model, params, memory, targets, grid)
  chances = jax.nn.softmax(jnp.where(there, logprobs, -jnp.inf), axis=-1)
  worth = jnp.where(there, grid.scores[None], 0.0)
  return jnp.sum(chances * worth, axis=-1)


def squared_error(means: jax.Array, truth: jax.Array) -> jax.Array:
  """Sum of squared errors of (B, O); NaN in `truth` is left out."""
  there = jnp.isfinite(truth)
  error = means - jnp.where(there, truth, 0.0)
  return jnp.sum(jnp.where(there, jnp.square(error), 0.0))


def ranking_loss(means: jax.Array, truth: jax.Array) -> jax.Array:
  """Logistic loss of the pairs of a batch, times its examples.

  -log sigmoid(m_i - m_j) over pairs with truth_i > truth_j, in units of the
  spread of `means`' own scale; the mean over pairs of each objective, summed
  over examples, so that it adds up like the other losses.
  """
  there = jnp.isfinite(truth)
  values = jnp.where(there, truth, 0.0)
  gap = means[:, None] - means[None]
  above = values[:, None] > values[None]
  pairs = above & there[:, None] & there[None]
  losses = jnp.where(pairs, jax.nn.softplus(-gap), 0.0).sum((0, 1))
  count = jnp.maximum(pairs.sum((0, 1)), 1)
  return jnp.sum(losses / count) * means.shape[0]
