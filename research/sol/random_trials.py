"""Random schedules as baselines, and choices that know the true labels.

Axis letters: W windows, E episodes, P budgets, M random schedules, T steps.
"""

import numpy as np

from research.sol import controllers
from research.sol.controllers import TwoLevels
from research.sol.scoring import BlockSeries, Score


def play(score, levels, shape, plan, found) -> None:
  """Random schedules: one, the best whole-set trials, and what labels give.

  Neither of the last two is a bound: the best of a pool is the best of few, and
  the gains that tokens are chosen by are measured with the pool's noise.

  Args:
    score: (label, series, keep_tokens) -> scores by name.
    levels: P pairs of levels.
    shape: (W, E, T) of the text.
    plan: has the size M of the pool and the seed.
    found: takes the scores.
  """
  pool_size = plan.random_pool
  single, best_30, best_500, per_window = [], [], [], []
  oracle_actions = []
  for budget, level in enumerate(levels):
    pool = np.stack(
      [
        controllers.random_schedule(
          level, shape, seed=(plan.seed * 1000 + budget) * 1000 + trial
        )
        for trial in range(pool_size)
      ]
    ).astype(np.int16)
    name = f"random {budget + 1}/{len(levels)}"
    scores = score(
      name, [BlockSeries(name=name, actions=pool)], keep_tokens=True
    )[name]
    single.append(scores[0])
    if pool_size < 2:
      continue
    nll = np.stack([one.nll for one in scores])
    spent = np.stack([one.spent for one in scores])
    generator = np.random.default_rng((plan.seed, budget))
    draws = generator.integers(0, pool_size, size=(500, *nll.shape[1:]))
    # Trial t plays schedule draws[t] of the pool in each episode.
    totals = np.array(
      [np.take_along_axis(nll, d[None], 0).sum() for d in draws]
    )
    found.trials.append(totals / scores[0].tokens.sum())
    for count, out in ((30, best_30), (500, best_500)):
      best = draws[totals[:count].argmin()]
      out.append(_chosen(scores[0], nll, spent, best))
    per_window.append(_chosen(scores[0], nll, spent, nll.argmin(0)))
    own = np.stack([one.own for one in scores])
    oracle_actions.append(_oracle_schedule(level, pool, own))
  found.baselines["random"] = single
  if pool_size < 2:
    return
  found.baselines["random, best of 30"] = best_30
  found.baselines["random, best of 500"] = best_500
  found.oracles[f"per-window best of {pool_size}"] = per_window
  found.oracles[f"true gains of {pool_size} schedules"] = score(
    "oracle",
    [BlockSeries(name="oracle", actions=np.stack(oracle_actions))],
  )["oracle"]


def _chosen(like: Score, nll, spent, index) -> Score:
  """The episodes of a pool (M, W, E) that `index` (W, E) picks."""
  return Score(
    nll=np.take_along_axis(nll, index[None], 0)[0],
    spent=np.take_along_axis(spent, index[None, ..., None], 0)[0],
    tokens=like.tokens,
  )


def _oracle_schedule(
  level: TwoLevels, pool: np.ndarray, own: np.ndarray
) -> np.ndarray:
  """Upper levels on the tokens with the largest true own-step gain.

  The gain of an axis is the difference of a token's mean log-likelihood over
  the schedules that gave it the upper and the lower level: (W, E, T).
  """
  corner = np.zeros(int(level.lookup.max()) + 1, np.int64)
  # Where an axis has one level only, several corners share an action.
  for index in range(8):
    corner[level.lookup[index]] = index
  upper = (corner[pool][..., None] >> np.array([2, 1, 0])) & 1
  out = np.zeros((*pool.shape[1:], 3), bool)
  for axis in range(3):
    share = level.shares[axis]
    if share >= 1 or share <= 0:
      out[..., axis] = share >= 1
      continue
    high = upper[..., axis].astype(bool)
    count_high = np.maximum(high.sum(0), 1)
    count_low = np.maximum((~high).sum(0), 1)
    gain = (own * high).sum(0) / count_high - (own * ~high).sum(0) / count_low
    out[..., axis] = gain >= np.quantile(gain, 1 - share)
  return level.pick(out).astype(np.int16)
