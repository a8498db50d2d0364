"""The baseline to beat: a ridge regression of counterfactual gains.

Training windows are scored under random schedules; the gain of an action at a
token, its own-step effect and what it does to later tokens, is regressed on
nine scalars that are free at decode time. At a price, the action with the
largest predicted gain less its cost is taken. No reinforcement learning, no
network, no hidden state. With two actions it is a threshold.

Axis letters: W windows, E episodes, K schedules, T steps, A actions, F basis
features of an action (`ActionTable.basis`), X = 10 scalars and a constant.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research.sol import cost, credit
from research.sol import rollout as rollout_lib
from research.sol.actions import ActionTable
from research.sol.rollout import Controller, Setup


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _sums(setup, params, tokens, starts, schedules, gamma, key, scale):
  """Normal equations of one batch: Z'Z (FX, FX) and Z'y (FX,)."""
  windows, episodes = starts.shape
  horizon = setup.horizon
  shape = (windows, episodes * schedules, horizon)
  actions = jax.random.randint(key, shape, 0, setup.table.size)
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
  returns = credit.residual_to_go(
    group(result.log_p), group(costs[actions]), gamma
  )
  x = _with_constant(result.observations.scalars) * scale[None, None, None]
  features = jnp.asarray(setup.table.basis())[actions]
  z = centre(group(features[..., :, None] * x[..., None, :]))
  z = z.reshape(-1, features.shape[-1] * x.shape[-1])
  y = centre(returns).reshape(-1)
  highest = jax.lax.Precision.HIGHEST
  return jnp.matmul(z.T, z, precision=highest), jnp.matmul(
    z.T, y, precision=highest
  )


def _with_constant(scalars: jax.Array) -> jax.Array:
  return jnp.concatenate([scalars, jnp.ones_like(scalars[..., :1])], axis=-1)


def fit_ridge(
  setup: Setup,
  params: transformer.Params,
  batches: Iterable[np.ndarray],
  starts: np.ndarray,
  *,
  schedules: int = 32,
  gamma: float = 1.0,
  ridge: float = 1e-3,
  seed: int = 0,
) -> np.ndarray:
  """Fits the gains of all actions on the nine scalars.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    batches: token windows (W, S').
    starts: (E,) first tokens of the episodes.
    schedules: random schedules of an episode.
    gamma: discount of later tokens' share of the gain.
    ridge: penalty a sample, on features of unit scale.
    seed: of the schedules.

  Returns:
    (10, F) float32 coefficients on raw scalars, the last row the intercept.
  """
  features = setup.table.basis().shape[1]
  scale = np.array([1 / 3, 1 / 3, 1 / 3, 1 / 3, 0.1, 1, 0.02, 0.01, 0.5, 1])
  xx, xy, count = 0.0, 0.0, 0
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
      key,
      jnp.asarray(scale, jnp.float32),
    )
    xx = xx + np.asarray(part[0], np.float64)
    xy = xy + np.asarray(part[1], np.float64)
    count += tiled.size * schedules * setup.horizon
  weights = np.linalg.solve(xx + ridge * count * np.eye(len(xy)), xy)
  weights = weights.reshape(features, scale.size).T * scale[:, None]
  return weights.astype(np.float32)


@functools.lru_cache(maxsize=16)
def controller(table: ActionTable) -> Controller:
  """Largest predicted gain less price times net keep.

  Its parameters are the coefficients (10, F), its goal the price (W, R, 1).
  """

  def act(coefficients, goal, carry, seen, key):
    del key
    gains = _with_constant(seen.scalars) @ coefficients @ table.basis().T
    costs = cost.net_keep(table).astype(np.float32)
    value = gains - goal * costs[None, None]
    return jnp.argmax(value, axis=-1).astype(jnp.int32), carry, ()

  return Controller(start=lambda params, goal: (), act=act)
