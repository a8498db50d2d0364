"""The baseline to beat: a regression of counterfactual gains on few scalars.

Training windows are scored under random schedules; the gain of an action at a
token, its own-step effect and what it does to later tokens, is regressed on
nine scalars that are free at decode time:

  gain(a, x) = -sum_axis damage(a, axis) * sensitivity(w_axis . x)

with the mean damage of levels and the sensitivity of `research/sol/damage.py`
and x the standardised scalars and a constant: least squares, or on divergences
their gamma deviance, with a ridge. At a price, the action with the largest
predicted gain less its cost is taken. No reinforcement learning, no network, no
hidden state. With two levels it is a threshold.

Axis letters: W windows, E episodes, K schedules, T steps, A actions, X = 10
scalars and a constant, n = W E groups.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from models import transformer
from research.sol import behaviour as behaviour_lib
from research.sol import cost, credit
from research.sol import damage as damage_lib
from research.sol import rollout as rollout_lib
from research.sol.actions import ActionTable
from research.sol.rollout import Controller, Setup


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _samples(
  setup,
  params,
  tokens,
  starts,
  schedules,
  gamma,
  reward,
  damage,
  log_price,
  key,
  scalar_stats,
):
  """What a batch teaches, each (n, K, T, ...).

  Divergences, damages (3), scalars (X), and the mean damage of the schedules
  (n, K, 1). With labels, instead of divergences gains, centred over the group
  and weighted by their price, as in the warm start.
  """
  windows, episodes = starts.shape
  horizon = setup.horizon
  low, high = log_price
  price_key, draw_key = jax.random.split(key)
  price = jax.random.uniform(price_key, (windows, episodes))
  price = jnp.repeat(jnp.exp(low + (high - low) * price), schedules, axis=1)
  net_keep = cost.net_keep(setup.table).astype(np.float32)
  mean_gains = damage_lib.mean_gains(damage)
  actions = behaviour_lib.draw(net_keep, mean_gains, price, horizon, draw_key)
  prefix = setup.build_prefix(params, tokens[:, : tokens.shape[1] - horizon], 2)
  dense = None
  if reward == "divergence":
    dense = rollout_lib.dense_hidden(setup, params, prefix, tokens, starts)
  result = rollout_lib.score_block(
    setup,
    params,
    prefix,
    tokens,
    jnp.repeat(starts, schedules, axis=1),
    actions,
    record=True,
    dense=dense,
  )
  group = lambda x: x.reshape(-1, schedules, *x.shape[2:])
  mean, scale = (row[None, None, None] for row in scalar_stats)
  x = group(_with_constant((result.observations.scalars - mean) / scale))
  damages = group(damage[actions])
  drawn = behaviour_lib.mean_damage(net_keep, mean_gains, price)
  drawn = group(drawn)[..., None]
  if reward == "divergence":
    return group(result.divergence), damages, x, drawn
  costs = rollout_lib.action_costs(setup.table)
  gains = credit.residual_to_go(
    group(result.log_p), group(costs[actions]), gamma
  )
  gains = gains - jnp.mean(gains, axis=1, keepdims=True)
  spread = behaviour_lib.gain_scale(net_keep, mean_gains, price)
  root = 1.0 / group(spread)[..., None]
  return gains * root, damages * root[..., None], x, drawn


def _with_constant(scalars: jax.Array) -> jax.Array:
  return jnp.concatenate([scalars, jnp.ones_like(scalars[..., :1])], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_slope(reward, weights, gains, damages, x, drawn):
  """Loss of weights (X, 3), see `_samples`, and its gradient."""

  def loss(w):
    raw = jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)
    own = jnp.sum(damages * damage_lib.sensitivity(raw), axis=-1)
    if reward == "divergence":
      return damage_lib.divergence_loss(gains, own, drawn)
    gain = jnp.mean(own, axis=1, keepdims=True) - own
    return jnp.mean(jnp.square(gain - gains))

  return jax.value_and_grad(loss)(weights)


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
  reward: str = "label",
  ridges: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0, 10.0),
  seed: int = 0,
) -> np.ndarray:
  """Fits the sensitivities of all axes on the nine scalars.

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
    reward: "label" or "divergence", see `learn.Method`.
    ridges: penalties of squared coefficients to choose from, relative to the
      mean squared gain with labels.
    seed: of the schedules.

  Returns:
    (10, 3) float32 coefficients of each axis' sensitivity on standardised
    scalars and a constant; zero is the mean damage for every token.
  """
  parts = [[], []]
  for number, tokens in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(seed), number)
    tiled = jnp.asarray(np.tile(starts, (len(tokens), 1)).astype(np.int32))
    sample = _samples(
      setup,
      params,
      jnp.asarray(tokens),
      tiled,
      schedules,
      gamma,
      reward,
      damage,
      log_price,
      key,
      scalar_stats,
    )
    parts[int(number % 4 == 1)].append(sample)
  join = lambda x: jax.tree.map(lambda *y: jnp.concatenate(y), *x)
  fitted, held = join(parts[0]), join(parts[1])
  shape = (scalar_stats.shape[1] + 1, damage.shape[1])

  def solve(data, ridge, start):
    penalty = ridge
    if reward == "label":
      penalty *= float(jnp.mean(jnp.square(data[0])))

    def objective(flat):
      guess = jnp.asarray(flat.reshape(shape), jnp.float32)
      loss, slope = _loss_and_slope(reward, guess, *data)
      slope = np.asarray(slope, np.float64).reshape(-1)
      return (
        float(loss) + penalty * flat @ flat,
        slope + 2 * penalty * flat,
      )

    found = scipy.optimize.minimize(
      objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 60}
    )
    return found.x

  # From strict to loose, each from where the last one ended.
  weights, losses = np.zeros(shape).reshape(-1), {}
  for ridge in sorted(ridges, reverse=True):
    weights = solve(fitted, ridge, weights)
    guess = jnp.asarray(weights.reshape(shape), jnp.float32)
    losses[ridge] = float(_loss_and_slope(reward, guess, *held)[0])
  best = min(losses, key=losses.get)
  both = join([fitted, held])
  weights = solve(both, best, np.zeros(shape).reshape(-1))
  return weights.reshape(shape).astype(np.float32)


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
    highest = jax.lax.Precision.HIGHEST
    raw = jnp.matmul(x, coefficients, precision=highest)
    gains = damage_lib.gains(damage_lib.sensitivity(raw), damage)
    costs = cost.net_keep(table).astype(np.float32)
    value = gains - goal * costs[None, None]
    return jnp.argmax(value, axis=-1).astype(jnp.int32), carry, ()

  return Controller(start=lambda params, goal: (), act=act)
