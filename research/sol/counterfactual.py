"""The baseline to beat: a ridge regression of counterfactual gains.

Training windows are scored under random schedules; the gain of an action at a
token, its own-step effect and what it does to later tokens, is regressed on
nine scalars that are free at decode time:

  gain(a, x) = -sum_axis damage(a, axis) * (w_axis . x)

with the mean damage of levels (`research/sol/damage.py`) and x the standardised
scalars and a constant. When it plays, the line is bent to an exponential of the
same value and slope at the mean token, so that no sensitivity is negative. At a
price, the action with the largest predicted gain less its cost is taken. No
reinforcement learning, no network, no hidden state. With two levels it is a
threshold.

Axis letters: W windows, E episodes, K schedules, T steps, A actions, X = 10
scalars and a constant.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research.sol import behaviour as behaviour_lib
from research.sol import cost, credit
from research.sol import damage as damage_lib
from research.sol import rollout as rollout_lib
from research.sol.actions import ActionTable
from research.sol.rollout import Controller, Setup


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _sums(
  setup,
  params,
  tokens,
  starts,
  schedules,
  gamma,
  damage,
  log_price,
  key,
  scalar_stats,
):
  """Normal equations of one batch: Z'Z (3X, 3X) and Z'y (3X,).

  Groups are weighted by their price, as in the warm start.
  """
  windows, episodes = starts.shape
  horizon = setup.horizon
  low, high = log_price
  price_key, draw_key = jax.random.split(key)
  price = jax.random.uniform(price_key, (windows, episodes))
  price = jnp.repeat(jnp.exp(low + (high - low) * price), schedules, axis=1)
  actions = behaviour_lib.draw(
    cost.net_keep(setup.table).astype(np.float32),
    damage_lib.mean_gains(damage),
    price,
    horizon,
    draw_key,
  )
  prefix = setup.build_prefix(params, tokens[:, : tokens.shape[1] - horizon], 2)
  result = rollout_lib.score_block(
    setup,
    params,
    prefix,
    tokens,
    jnp.repeat(starts, schedules, axis=1),
    actions,
    record=True,
  )
  group = lambda x: x.reshape(-1, schedules, *x.shape[2:])
  centre = lambda x: x - jnp.mean(x, axis=1, keepdims=True)
  costs = rollout_lib.action_costs(setup.table)
  y = centre(
    credit.residual_to_go(group(result.log_p), group(costs[actions]), gamma)
  )
  spread = behaviour_lib.gain_scale(
    cost.net_keep(setup.table).astype(np.float32),
    damage_lib.mean_gains(damage),
    price,
  )
  weight = group(spread)[..., None] ** -2
  mean, scale = (row[None, None, None] for row in scalar_stats)
  x = _with_constant((result.observations.scalars - mean) / scale)
  features = -damage[actions]
  z = centre(group(features[..., :, None] * x[..., None, :]))
  z = z * jnp.sqrt(weight)[..., None, None]
  z = z.reshape(-1, features.shape[-1] * x.shape[-1])
  y = (y * jnp.sqrt(weight)).reshape(-1)
  highest = jax.lax.Precision.HIGHEST
  return (
    jnp.matmul(z.T, z, precision=highest),
    jnp.matmul(z.T, y, precision=highest),
  )


def _with_constant(scalars: jax.Array) -> jax.Array:
  return jnp.concatenate([scalars, jnp.ones_like(scalars[..., :1])], axis=-1)


def fit_ridge(
  setup: Setup,
  params: transformer.Params,
  batches: Iterable[np.ndarray],
  starts: np.ndarray,
  *,
  damage: jax.Array,
  log_price: jax.Array,
  scalar_stats: jax.Array,
  schedules: int = 32,
  gamma: float = 1.0,
  ridges: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
  seed: int = 0,
) -> np.ndarray:
  """Fits the gains of all actions on the nine scalars.

  The ridge penalty is the one that predicts every fourth batch best from the
  others; the fit is then made on all.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    batches: token windows (W, S'), at least two of them.
    starts: (E,) first tokens of the episodes.
    damage: (A, 3) mean damage of actions, see `damage.measure`.
    log_price: (2,) range of prices that schedules are drawn around, as in
      the warm start.
    scalar_stats: (2, 9) mean and scale of the scalars.
    schedules: random schedules of an episode.
    gamma: discount of later tokens' share of the gain.
    ridges: penalties a sample, on features of unit scale, to choose from.
    seed: of the schedules.

  Returns:
    (10, 3) float32 coefficients of each axis' sensitivity on standardised
    scalars and a constant.
  """
  sums = [[0.0, 0.0], [0.0, 0.0]]
  counts = [0, 0]
  for number, tokens in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(seed), number)
    tiled = jnp.asarray(np.tile(starts, (len(tokens), 1)).astype(np.int32))
    part = _sums(
      setup,
      params,
      jnp.asarray(tokens),
      tiled,
      schedules,
      gamma,
      damage,
      log_price,
      key,
      scalar_stats,
    )
    held = int(number % 4 == 1)
    sums[held] = [
      total + np.asarray(x, np.float64)
      for total, x in zip(sums[held], part, strict=True)
    ]
    counts[held] += tiled.size * schedules * setup.horizon
  scalars = scalar_stats.shape[1] + 1
  # The constant shrinks towards the mean damage, all else towards zero.
  start = np.zeros((3, scalars))
  start[:, -1] = 1.0
  start = start.reshape(-1)

  def solve(xx, xy, count, ridge):
    penalty = ridge * count * np.eye(start.size)
    return start + np.linalg.solve(xx + penalty, xy - xx @ start)

  def held_out_loss(ridge):
    w = solve(*sums[0], counts[0], ridge)
    xx, xy = sums[1]
    return w @ xx @ w - 2 * w @ xy

  ridge = min(ridges, key=held_out_loss)
  both = [a + b for a, b in zip(*sums, strict=True)]
  weights = solve(*both, sum(counts), ridge)
  return weights.reshape(3, scalars).T.astype(np.float32)


@functools.lru_cache(maxsize=16)
def controller(table: ActionTable) -> Controller:
  """Largest predicted gain less price times net keep.

  Its parameters are the coefficients (10, 3), the scalars' mean and scale
  (2, 9) and the damage (A, 3), its goal the price (W, R, 1).
  """

  def act(params, goal, carry, seen, key):
    del key
    coefficients, (mean, scale), damage = params
    x = _with_constant((seen.scalars - mean[None, None]) / scale[None, None])
    # The line, but for large steps: no token gains from less compute.
    mean_of_axis = jnp.maximum(coefficients[-1], 0.1)[None, None]
    step = jnp.clip(x @ coefficients / mean_of_axis - 1.0, -3.0, 3.0)
    sensitivity = mean_of_axis * jnp.exp(step)
    gains = -jnp.matmul(
      sensitivity, damage.T, precision=jax.lax.Precision.HIGHEST
    )
    costs = cost.net_keep(table).astype(np.float32)
    value = gains - goal * costs[None, None]
    return jnp.argmax(value, axis=-1).astype(jnp.int32), carry, ()

  return Controller(start=lambda params, goal: (), act=act)
