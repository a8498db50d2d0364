"""Static baselines: one action, or two alternating, for every token.

They are drawn from every published level of every axis, whatever the policy may
choose from. The strongest static budget is found on training text: all
promising actions are scored there, and the lower convex hull of nll against
cost says which two neighbours to alternate for any budget. It may split a
budget over the axes in another way than the policy does.

Actions may cost the same, as bits cost no FLOPs, and their nll differ by
rounding alone. Such ties are broken on purpose: of the actions of one cost that
are within `TIE` of the best, the one with the highest net keep is taken, then
the first of the table; and what costs more must be better by more than `TIE`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from models import transformer
from research.sol import actions, scoring
from research.sol import damage as damage_lib
from research.sol.actions import AXES, ActionTable
from research.sol.cost import net_keep
from research.sol.rollout import Setup
from research.sol.scoring import BlockSeries
from research.sol.windows import Cover

# Single static actions (kappa, rho, bits) that stand for what the literature
# reports. They are variants of our own: Quest's pages with the first and the
# current page forced in, TEAL's share taken by the largest channels of the
# MLP's input instead of a threshold on every matrix, ZeroQuant's bits for the
# MLP's output alone.
POINTS = {
  "Quest variant, half of the pages": (0.5, 1.0, 16.0),
  "Quest variant, 30% of the pages": (0.3, 1.0, 16.0),
  "TEAL variant, 60% of the channels": (1.0, 0.6, 16.0),
  "TEAL variant, 80% of the channels": (1.0, 0.8, 16.0),
  "ZeroQuant variant, 5 bits": (1.0, 1.0, 5.0),
  "ZeroQuant variant, 8 bits": (1.0, 1.0, 8.0),
}


# Nats a token, above what sums of float32 logits leave open.
TIE = 1e-5


def every_level(table: ActionTable) -> ActionTable:
  """All combinations of the published levels and those of `table`."""
  published = actions.preset("J-FL")
  levels = [
    sorted({*published.levels(axis), *table.levels(axis)}) for axis in AXES
  ]
  return ActionTable.product("every level", *levels)


def candidates(
  costs: np.ndarray, gains: np.ndarray, kept: np.ndarray, most: int
) -> np.ndarray:
  """Actions that some price might choose, by their mean gains (A,).

  Takes the best few at every price, over enough prices and ranks to find
  about `most` actions; all of them where there are no more.

  Args:
    costs: (A,) of the actions.
    gains: (A,) nats.
    kept: (A,) net keep, which decides between equal ones.
    most: how many, about.
  """
  if len(costs) <= most:
    return np.arange(len(costs))
  slope = np.ptp(gains) / np.ptp(costs)
  value = (
    gains[None]
    - np.geomspace(slope / 100, slope * 10, 60)[:, None] * costs[None]
  )
  every = np.broadcast_to(kept, value.shape)
  order = np.lexsort((-every, -np.round(value / TIE)), axis=1)
  ends = [np.lexsort((-kept, sign * costs))[0] for sign in (1, -1)]
  found = np.unique(ends)
  for rank in range(len(costs)):
    wider = np.union1d(found, order[:, rank])
    if wider.size > most:
      break
    found = wider
  return found


def hull(costs: np.ndarray, nll: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Indices of the lower convex hull of the points (n,), by rising cost.

  Only the falling part: no point costs more and is worse than another, or
  better by no more than `TIE`.

  Args:
    costs: (n,), equal where they differ in the last digits alone.
    nll: (n,).
    kept: (n,) net keep, which decides between points of equal cost.
  """
  _, places = np.unique(np.round(costs / costs.max(), 9), return_inverse=True)
  corners: list[int] = []
  for place in range(places.max() + 1):
    equal = np.flatnonzero(places == place)
    near = equal[nll[equal] <= nll[equal].min() + TIE]
    i = near[np.argmax(kept[near])]
    if corners and nll[i] >= nll[corners[-1]] - TIE:
      continue
    while len(corners) > 1:
      a, b = corners[-2], corners[-1]
      cross = (costs[b] - costs[a]) * (nll[i] - nll[a])
      if cross > (costs[i] - costs[a]) * (nll[b] - nll[a]):
        break
      corners.pop()
    corners.append(int(i))
  return np.array(corners)


def alternate(
  first: int, second: int, share: float, shape: tuple[int, ...]
) -> np.ndarray:
  """Plays `second` on every n-th token, for a `share` of them: int16."""
  token = np.arange(int(np.prod(shape)))
  turn = np.floor((token + 1) * share + 0.5) > np.floor(token * share + 0.5)
  return np.where(turn, second, first).astype(np.int16).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Tried:
  """Static actions that were scored on training text.

  Attributes:
    actions: (n,) indices.
    nll: (n,) nats a token, or divergence from the dense model.
    kept: (n,) net keep.
  """

  actions: np.ndarray
  nll: np.ndarray
  kept: np.ndarray

  def schedules(
    self, costs: np.ndarray, asked: Sequence[float], shape: tuple[int, ...]
  ) -> np.ndarray:
    """The best schedules for `asked` costs: (P, *shape) int16.

    Args:
      costs: (A,) of all actions, in the unit of `asked`.
      asked: P mean costs a token.
      shape: (W, E, T) of the text to play on.
    """
    costs = costs[self.actions]
    corners = hull(costs, self.nll, self.kept)
    levels = costs[corners]
    played = []
    for want in asked:
      at = int(np.clip(np.searchsorted(levels, want), 1, len(levels) - 1))
      low, high = levels[at - 1], levels[at]
      width = high - low
      share = float(np.clip((want - low) / width, 0, 1)) if width else 1.0
      pair = self.actions[corners[[at - 1, at]]]
      played.append(alternate(*pair, share, shape))
    return np.stack(played)


def search(
  setup: Setup,
  params: transformer.Params,
  text: Cover,
  costs: Sequence[np.ndarray],
  *,
  window_batch: int,
  max_rows: int,
  divergence: bool,
  most: int,
  progress: Callable[[str, int], Callable[[int], None]],
) -> Tried:
  """Scores the promising actions of a table on training text.

  Args:
    setup: the set-up, with the A actions to choose from.
    params: of the frozen LLM.
    text: training text.
    costs: (A,) each, measures of cost that actions are to be promising in.
    window_batch: windows alive at a time.
    max_rows: rollouts of one call.
    divergence: compare candidates by their divergence from the dense model,
      which has less noise than the true tokens.
    most: candidates to score for a measure of cost.
    progress: (label, total tokens) -> callback with tokens just scored.
  """
  tokens = int(text.weights.sum())
  options = {
    "window_batch": window_batch,
    "max_rows": max_rows,
    "divergence": divergence,
  }
  levels = 1 + len(damage_lib.moves(setup.table))
  damage = damage_lib.measure(
    setup, params, text, progress=progress("levels", levels * tokens), **options
  )
  gains = damage_lib.mean_gains(damage)
  kept = net_keep(setup.table)
  tried = [candidates(one, gains, kept, most) for one in costs]
  tried = np.unique(np.concatenate(tried))
  played = np.broadcast_to(
    tried.astype(np.int16)[:, None, None, None],
    (tried.size, *text.weights.shape),
  )
  series = [BlockSeries(name="candidates", actions=played)]
  bar = progress("candidates", tried.size * tokens)
  scores = scoring.evaluate(
    setup, params, text, series, progress=bar, **options
  )
  nll = np.array([score.mean_nll for score in scores["candidates"]])
  return Tried(tried, nll, kept[tried])
