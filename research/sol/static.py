"""Static baselines: one action, or two alternating, for every token.

The strongest static budget is found on training text: all promising actions
are scored there, and the lower convex hull of nll against net keep says which
two neighbours to alternate for any budget. It may split a budget over the axes
in another way than the policy does.
"""

from collections.abc import Sequence

import numpy as np

from models import transformer
from research.sol import cost, scoring
from research.sol.actions import ActionTable
from research.sol.rollout import Setup
from research.sol.scoring import BlockSeries
from research.sol.windows import Cover

# Single static actions that the literature reports (kappa, rho, bits).
POINTS = {
  "Quest@50": (0.5, 1.0, 16.0),
  "Quest@30": (0.3, 1.0, 16.0),
  "TEAL@60": (1.0, 0.6, 16.0),
  "TEAL@80": (1.0, 0.8, 16.0),
  "ZeroQuant-5bit": (1.0, 1.0, 5.0),
  "ZeroQuant-8bit": (1.0, 1.0, 8.0),
}


def candidates(table: ActionTable, gains: np.ndarray, most: int) -> np.ndarray:
  """Actions that some price might choose, by their mean gains (A,).

  Takes the best few at every price, over enough prices and ranks to find
  about `most` actions; all of them where the table is no larger.
  """
  if table.size <= most:
    return np.arange(table.size)
  costs = cost.net_keep(table)
  slope = np.ptp(gains) / np.ptp(costs)
  value = (
    gains[None]
    - np.geomspace(slope / 100, slope * 10, 60)[:, None] * costs[None]
  )
  order = np.argsort(-value, axis=1)
  found = np.array([np.argmin(costs), np.argmax(costs)])
  for rank in range(table.size):
    wider = np.union1d(found, order[:, rank])
    if wider.size > most:
      break
    found = wider
  return found


def hull(costs: np.ndarray, nll: np.ndarray) -> np.ndarray:
  """Indices of the lower convex hull of the points (n,), by rising cost.

  Only the falling part: no point costs more and is worse than another.
  """
  kept: list[int] = []
  for i in np.lexsort((nll, costs)):
    if kept and nll[i] >= nll[kept[-1]]:
      continue
    while len(kept) > 1:
      a, b = kept[-2], kept[-1]
      cross = (costs[b] - costs[a]) * (nll[i] - nll[a])
      if cross > (costs[i] - costs[a]) * (nll[b] - nll[a]):
        break
      kept.pop()
    kept.append(int(i))
  return np.array(kept)


def alternate(
  first: int, second: int, share: float, shape: tuple[int, ...]
) -> np.ndarray:
  """Plays `second` on every n-th token, for a `share` of them: int16."""
  token = np.arange(int(np.prod(shape)))
  turn = np.floor((token + 1) * share + 0.5) > np.floor(token * share + 0.5)
  return np.where(turn, second, first).astype(np.int16).reshape(shape)


def best_static(
  setup: Setup,
  params: transformer.Params,
  calibration: Cover,
  gains: np.ndarray,
  asked: Sequence[float],
  shape: tuple[int, ...],
  *,
  window_batch: int,
  max_rows: int,
  divergence: bool = False,
  most: int = 128,
) -> BlockSeries:
  """The best static schedules for `asked` net keep rates, by training text.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    calibration: training text.
    gains: (A,) mean gains of the actions, which rank the candidates.
    asked: net keep rates.
    shape: (W, E, T) of the text to play on.
    window_batch: windows alive at a time.
    max_rows: rollouts of one call.
    divergence: compare candidates by their divergence from the dense model,
      which has less noise than the true tokens.
    most: candidates to score.
  """
  tried = candidates(setup.table, gains, most)
  actions = np.broadcast_to(
    tried.astype(np.int16)[:, None, None, None],
    (tried.size, *calibration.weights.shape),
  )
  scores = scoring.evaluate(
    setup,
    params,
    calibration,
    [BlockSeries(name="candidates", actions=actions)],
    window_batch=window_batch,
    max_rows=max_rows,
    divergence=divergence,
  )["candidates"]
  costs = cost.net_keep(setup.table)[tried]
  corners = hull(costs, np.array([score.mean_nll for score in scores]))
  levels = costs[corners]
  played = []
  for want in asked:
    at = int(np.clip(np.searchsorted(levels, want), 1, len(levels) - 1))
    low, high = levels[at - 1], levels[at]
    share = float(np.clip((want - low) / (high - low), 0, 1))
    pair = tried[corners[at - 1]], tried[corners[at]]
    played.append(alternate(*pair, share, shape))
  return BlockSeries(name="best static", actions=np.stack(played))
