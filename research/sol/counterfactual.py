"""The baseline to beat: a regression of counterfactual gains on few scalars.

Training windows are scored under random schedules; what an action did is
regressed on nine scalars that are free at decode time:

  gain(a, x) = -sum_axis damage(a, axis) * sensitivity(w_axis . x)

with the mean damage of levels and the sensitivity of `research/sol/damage.py`
and x the standardised scalars and a constant. From labels, own-step gains and
what they do to later tokens by least squares (`fit_labels`); from divergences,
on the samples of the warm start, by their gamma deviance (`fit_samples`); both
with a ridge. At a price, the action with the largest predicted gain less its
cost is taken. No reinforcement learning, no network, no hidden state. With two
levels it is a threshold.

Axis letters: W windows, E episodes, K schedules, T steps, A actions, X = 10
scalars and a constant, n = W E groups.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from models import transformer
from research.sol import cost, credit, random_schedules
from research.sol import damage as damage_lib
from research.sol import rollout as rollout_lib
from research.sol.rollout import Controller, Setup

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _label_samples(
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
  """What a batch teaches, each (n, K, T, ...).

  Gains, damages (3), scalars (X), and the mean damage of the schedules
  (n, K, 1). Gains and damages are weighted by their price, and gains centred
  over the group.
  """
  windows, episodes = starts.shape
  horizon = setup.horizon
  low, high = log_price
  price_key, draw_key = jax.random.split(key)
  price = jax.random.uniform(price_key, (windows, episodes))
  price = jnp.repeat(jnp.exp(low + (high - low) * price), schedules, axis=1)
  net_keep = cost.net_keep(setup.table).astype(np.float32)
  mean_gains = damage_lib.mean_gains(damage)
  actions = random_schedules.draw(
    net_keep, mean_gains, price, horizon, draw_key
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
  x = group(_standardised(result.observations.scalars, scalar_stats))
  drawn = random_schedules.mean_damage(net_keep, mean_gains, price)
  costs = rollout_lib.action_costs(setup.table)
  gains = credit.residual_to_go(
    group(result.log_p), group(costs[actions]), gamma
  )
  gains = gains - jnp.mean(gains, axis=1, keepdims=True)
  spread = random_schedules.gain_scale(net_keep, mean_gains, price)
  root = 1.0 / group(spread)[..., None]
  damages = group(damage[actions]) * root[..., None]
  return gains * root, damages, x, group(drawn)[..., None]


def _standardised(scalars: jax.Array, stats: jax.Array) -> jax.Array:
  """(..., 9) to (..., X), with a constant."""
  mean, scale = (
    row.reshape((1,) * (scalars.ndim - 1) + (-1,)) for row in stats
  )
  return _with_constant((scalars - mean) / scale)


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


def fit_labels(
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
  ridges: Sequence[float] = RIDGES,
  seed: int = 0,
) -> np.ndarray:
  """Fits the sensitivities of all axes to likelihoods of true tokens.

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
    ridges: penalties of squared coefficients to choose from, relative to the
      mean squared gain.
    seed: of the schedules.

  Returns:
    (10, 3) float32 coefficients of each axis' sensitivity on standardised
    scalars and a constant; zero is the mean damage for every token.
  """
  parts = [[], []]
  for number, tokens in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(seed), number)
    tiled = jnp.asarray(np.tile(starts, (len(tokens), 1)).astype(np.int32))
    sample = _label_samples(
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
    parts[int(number % 4 == 1)].append(sample)
  join = lambda x: jax.tree.map(lambda *y: jnp.concatenate(y), *x)
  return _fit("label", join(parts[0]), join(parts[1]), ridges)


def fit_samples(
  samples: Mapping[str, np.ndarray],
  *,
  costs: np.ndarray,
  damage: jax.Array,
  scalar_stats: jax.Array,
  ridges: Sequence[float] = RIDGES,
) -> np.ndarray:
  """Fits the sensitivities of all axes to divergences.

  The ridge penalty is the one that predicts the last quarter of the episodes
  best from the others.

  Args:
    samples: of `warm_start.score`: what the policy itself is fitted to.
    costs: (A,) of the actions, by which schedules were drawn.
    damage: (A, 3), see `fit_labels`, as what follows.
    scalar_stats: (2, 9).
    ridges: penalties of squared coefficients.

  Returns:
    (10, 3) float32, see `fit_labels`.
  """
  drawn = random_schedules.mean_damage(
    costs,
    damage_lib.mean_gains(damage),
    jnp.asarray(samples["price"])[:, None],
  )
  data = (
    jnp.asarray(samples["divergence"]),
    jnp.asarray(damage)[samples["action"]],
    _standardised(jnp.asarray(samples["scalars"]), jnp.asarray(scalar_stats)),
    drawn,
  )
  at = 3 * len(samples["price"]) // 4
  fitted = jax.tree.map(lambda x: x[:at], data)
  held = jax.tree.map(lambda x: x[at:], data)
  return _fit("divergence", fitted, held, ridges)


def _fit(reward, fitted, held, ridges) -> np.ndarray:
  """Coefficients (X, 3) with the penalty that suits `held` best."""
  shape = (fitted[2].shape[-1], fitted[1].shape[-1])

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

  # Penalties go from strict to loose, and each fit starts where the last one
  # ended.
  weights, losses = np.zeros(shape).reshape(-1), {}
  for ridge in sorted(ridges, reverse=True):
    weights = solve(fitted, ridge, weights)
    guess = jnp.asarray(weights.reshape(shape), jnp.float32)
    losses[ridge] = float(_loss_and_slope(reward, guess, *held)[0])
  best = min(losses, key=losses.get)
  both = jax.tree.map(lambda *x: jnp.concatenate(x), fitted, held)
  weights = solve(both, best, np.zeros(shape).reshape(-1))
  return weights.reshape(shape).astype(np.float32)


@functools.lru_cache(maxsize=16)
def controller(charged: tuple[float, ...]) -> Controller:
  """Largest predicted gain less price times cost, of A actions.

  Its parameters are the coefficients (10, 3), the scalars' mean and scale
  (2, 9) and the damage (A, 3), its goal the price (W, R, 1).

  Args:
    charged: A costs, see `PolicyConfig.costs`.
  """

  def act(params, goal, carry, seen, key):
    del key
    coefficients, stats, damage = params
    x = _standardised(seen.scalars, stats)
    highest = jax.lax.Precision.HIGHEST
    raw = jnp.matmul(x, coefficients, precision=highest)
    gains = damage_lib.gains(damage_lib.sensitivity(raw), damage)
    costs = np.asarray(charged, np.float32)
    value = gains - goal * costs[None, None]
    return jnp.argmax(value, axis=-1).astype(jnp.int32), carry, ()

  return Controller(start=lambda params, goal: (), act=act)
