"""The baseline to beat: a ridge regression of counterfactual gains.

Training windows are scored under random half/half schedules in antithetic
pairs; the gain of an axis' upper level at a token, its own-step effect and
what it does to later tokens, is regressed on nine scalars that are free at
decode time. No reinforcement learning, no network.
"""

from collections.abc import Iterable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research.sol import credit
from research.sol import rollout as rollout_lib
from research.sol.rollout import Setup


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _sums(setup, params, tokens, starts, lookup, schedules, gamma, key):
  """Normal equations of one batch: X'X (10, 10) and X'y (10, 3)."""
  windows, episodes = starts.shape
  horizon = setup.horizon
  shape = (windows, episodes, schedules // 2, horizon, 3)
  half = jax.random.bernoulli(key, 0.5, shape)
  upper = jnp.concatenate([half, ~half], axis=2)
  weights = jnp.asarray([4, 2, 1])
  actions = lookup[jnp.sum(upper * weights[None, None, None, None], -1)]
  rows = (windows, episodes * schedules)
  prefix = setup.build_prefix(
    params, tokens[:, : tokens.shape[1] - horizon], 2
  )
  result = rollout_lib.score_block(
    setup,
    params,
    prefix,
    tokens,
    jnp.repeat(starts, schedules, axis=1),
    actions.reshape(*rows, horizon),
    record=True,
  )
  sign = 2.0 * upper.reshape(-1, schedules, horizon, 3) - 1.0
  rewards = result.log_p.reshape(-1, schedules, horizon)
  returns = credit.residual_to_go(rewards, sign, gamma)
  returns = returns - jnp.mean(returns, axis=1, keepdims=True)
  # E[2 z G] over z = +-1 is the difference between upper and lower level.
  gains = (2.0 * sign * returns[..., None]).reshape(-1, 3)
  scalars = result.observations.scalars.reshape(-1, 9)
  x = jnp.concatenate([scalars, jnp.ones_like(scalars[:, :1])], axis=-1)
  return x.T @ x, x.T @ gains


def fit_ridge(
  setup: Setup,
  params: transformer.Params,
  batches: Iterable[np.ndarray],
  starts: np.ndarray,
  *,
  schedules: int = 20,
  gamma: float = 1.0,
  ridge: float = 1e-3,
  seed: int = 0,
) -> np.ndarray:
  """Fits gains of the upper level of each axis on the nine scalars.

  Upper and lower levels are the largest and smallest of the action table.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    batches: token windows (W, S').
    starts: (E,) first tokens of the episodes.
    schedules: random schedules of an episode, an even number.
    gamma: discount of later tokens' share of the gain.
    ridge: penalty relative to each feature's own scale.
    seed: of the schedules.

  Returns:
    (10, 3) float32 coefficients on raw scalars, the last row the intercept.
  """
  table = setup.table
  index = {
    point: i
    for i, point in enumerate(
      zip(table.kappa, table.rho, table.bits, strict=True)
    )
  }
  ends = [(min(a), max(a)) for a in (table.kappa, table.rho, table.bits)]
  lookup = jnp.asarray(
    [index[(k, r, b)] for k in ends[0] for r in ends[1] for b in ends[2]]
  )
  xx, xy = np.zeros((10, 10)), np.zeros((10, 3))
  for number, tokens in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(seed), number)
    tiled = jnp.asarray(np.tile(starts, (len(tokens), 1)).astype(np.int32))
    part = _sums(
      setup,
      params,
      jnp.asarray(tokens),
      tiled,
      lookup,
      schedules,
      gamma,
      key,
    )
    xx += np.asarray(part[0], np.float64)
    xy += np.asarray(part[1], np.float64)
  return solve_ridge(xx, xy, ridge).astype(np.float32)


def solve_ridge(xx: np.ndarray, xy: np.ndarray, ridge: float) -> np.ndarray:
  """Ridge on standardised features from the sums (n, n) and (n, m).

  The last feature is the constant 1 and carries no penalty.
  """
  count = xx[-1, -1]
  mean = xx[-1] / count
  variance = np.diag(xx) / count - mean**2
  penalty = ridge * count * np.maximum(variance, 1e-12)
  penalty[-1] = 0.0
  return np.linalg.solve(xx + np.diag(penalty), xy)
