"""What each level of each axis costs in nats, measured on training text.

Per-token gains are tiny against their noise, but they have a shape in common:
what a level costs a token is what it costs on average, times how sensitive the
token is. The average is measured here, exactly and once, by static schedules
that move one axis; learning is left with three sensitivities a token.

Axis letters: W windows, E episodes, T steps, A actions.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research.sol import scoring
from research.sol.actions import AXES, FULL_BITS, ActionTable
from research.sol.rollout import Setup
from research.sol.scoring import BlockSeries
from research.sol.windows import Cover

_FULL = {"kappa": 1.0, "rho": 1.0, "bits": FULL_BITS}
# Damage, in nats a token, below which a budget is not worth a price.
_NEGLIGIBLE = 0.01
# Share of their mean damage that earlier tokens' actions do to this one.
_INHERITED = 0.13
# Share of its mean damage that an action does to later tokens, which read the
# keys and values that it leaves behind. By moving single tokens of a static
# schedule (SmolLM2, 128 episodes): a quarter of the own step's where rho is
# low, and without a correlation (rank .05) with what the own step suffers, so
# that it is charged alike to all tokens.
LATER = 0.25
# Factor between the middle price and each end, at least.
_SPREAD = 4.0


def sensitivity(raw: jax.Array) -> jax.Array:
  """How much more than the mean a token is damaged: exp, within [1/20, 20].

  Bounded, since exp of one stray input must not decide alone.
  """
  return jnp.exp(3.0 * jnp.tanh(raw / 3.0))


def gains(sensitivity: jax.Array, damage: jax.Array) -> jax.Array:
  """What actions do to all tokens: (..., A), nats, at most 0.

  Args:
    sensitivity: (..., 3) of the tokens that the actions are for.
    damage: (A, 3), from `measure`.
  """
  highest = jax.lax.Precision.HIGHEST
  return -jnp.matmul(sensitivity + LATER, damage.T, precision=highest)


def divergence_loss(
  divergence: jax.Array, own: jax.Array, drawn: jax.Array
) -> jax.Array:
  """Mean gamma deviance of divergences from what is predicted of them.

  A token's divergence is a mean times a factor that spreads over several orders
  of magnitude, and squared errors would follow a few tokens. The gamma
  deviance is the efficient estimator of means under such noise, and weighs all
  tokens and all prices alike.

  Args:
    divergence: (..., T) of the dense model's predictions, in nats.
    own: (..., T) predicted for the token's own action.
    drawn: mean damage of the schedules' actions, which broadcasts to
      (..., T): what earlier tokens leave behind is a share of it.
  """
  mean = own + _INHERITED * drawn + 1e-4
  return jnp.mean(divergence / mean + jnp.log(mean))


def moves(table: ActionTable) -> list[tuple[str, float]]:
  """Every axis and level of a table that is less than full."""
  return [
    (axis, level)
    for axis in AXES
    for level in table.levels(axis)
    if level != _FULL[axis]
  ]


def measure(
  setup: Setup,
  params: transformer.Params,
  text: Cover,
  *,
  window_batch: int,
  max_rows: int = 4096,
  divergence: bool = False,
  progress: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
  """Mean damage (A, 3) of the level that each action has on each axis.

  Each level is played alone on all tokens of `text`, the other axes full. The
  curve over the levels of an axis is made falling and convex (its lower hull),
  zero at full.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    text: training text.
    window_batch: windows alive at a time.
    max_rows: rollouts of one call.
    divergence: measure it as divergence from the dense model (KL) instead of on
      the true tokens: less noise, the same mean where the model is calibrated.
    progress: called with the number of tokens just scored.
  """
  moved = moves(setup.table)
  played = [_FULL] + [_FULL | {axis: level} for axis, level in moved]
  table = dataclasses.replace(
    setup.table,
    name="levels",
    **{axis: tuple(one[axis] for one in played) for axis in AXES},
  )
  number = np.arange(table.size, dtype=np.int16)[:, None, None, None]
  actions = np.broadcast_to(number, (table.size, *text.weights.shape))
  scores = scoring.evaluate(
    dataclasses.replace(setup, table=table),
    params,
    text,
    [BlockSeries(name="levels", actions=actions)],
    window_batch=window_batch,
    max_rows=max_rows,
    divergence=divergence,
    progress=progress,
  )["levels"]
  extra = np.array([score.mean_nll for score in scores])
  extra = np.maximum(extra - extra[0], 0.0)[1:]
  columns = []
  for axis in AXES:
    own = [i for i, (name, _) in enumerate(moved) if name == axis]
    levels = np.array([moved[i][1] for i in own] + [_FULL[axis]])
    curve = convex(levels, np.append(extra[own], 0.0))
    at = np.searchsorted(levels, getattr(setup.table, axis))
    columns.append(curve[at])
  return np.stack(columns, axis=1).astype(np.float32)


def convex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Lower convex hull of the points (n,), x rising, read at every x."""
  kept: list[int] = []
  for i in range(len(x)):
    while len(kept) > 1:
      a, b = kept[-2], kept[-1]
      if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
        break
      kept.pop()
    kept.append(i)
  return np.interp(x, x[kept], y[kept])


def mean_gains(damage: np.ndarray) -> np.ndarray:
  """Gains (A,) in nats above the worst action, from `measure`."""
  total = damage.sum(axis=1)
  return total.max() - total


def log_prices(costs: np.ndarray, damage: np.ndarray) -> np.ndarray:
  """Logarithms (2,) of the lowest and highest price worth learning.

  At the lowest, the best static action does negligible damage; at the highest,
  it is within 3% of the cheapest.

  Args:
    costs: (A,) that the price is charged for.
    damage: (A, 3), from `measure`.
  """
  total = damage.sum(axis=1)
  prices = np.geomspace(1e-4, 1e3, 400)
  choice = np.argmin(total[None] / prices[:, None] + costs[None], axis=1)
  low = prices[np.argmax(total[choice] >= min(_NEGLIGIBLE, total.max() / 2))]
  floor = costs.min() + 0.03 * np.ptp(costs)
  high = prices[np.argmax(costs[choice] <= floor)]
  # Tokens differ by such factors, even where all static budgets share a price.
  middle = np.sqrt(low * high)
  ends = [min(low, middle / _SPREAD), max(high, middle * _SPREAD)]
  return np.log(ends).astype(np.float32)
