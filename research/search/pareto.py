"""Pareto fronts, hypervolumes and how far a search is from the best front.

Values are (N, M): N points, M objectives, of which less is better.
"""

import bisect

import numpy as np

from models.errors import InputError


def front(values: np.ndarray) -> np.ndarray:
  """Places of the points that no other dominates, in the order of the first.

  A point dominates another that it is nowhere worse than and somewhere better.
  Equal points do not dominate each other, and all of them are given. Points
  with an infinite value are never on a front.

  Args:
    values: (N, M).

  Returns:
    (F,) integers, by the first objective.
  """
  values = _checked(values)
  order = np.lexsort(values.T[::-1])
  order = order[np.isfinite(values[order]).all(1)]
  # A point can be dominated by one before it in this order, alone.
  kept: list[np.ndarray] = []
  places, block = [], np.empty((0, values.shape[1]))
  for at in order:
    point = values[at]
    no_worse = (block <= point).all(1)
    if not (no_worse & (block < point).any(1)).any():
      places.append(at)
      kept.append(point)
      block = np.asarray(kept)
  return np.asarray(places, np.int64)


def ranks(values: np.ndarray) -> np.ndarray:
  """Ranks (N,): 0 on the front, 1 on the front of the others, and so on.

  Points with an infinite value come last, all of one rank.
  """
  values = _checked(values)
  found = np.full(len(values), -1)
  left, rank = np.flatnonzero(np.isfinite(values).all(1)), 0
  while len(left):
    best = left[front(values[left])]
    found[best] = rank
    left, rank = np.setdiff1d(left, best, assume_unique=True), rank + 1
  found[found < 0] = rank
  return found


def crowding(values: np.ndarray) -> np.ndarray:
  """Distance (N,) of a point's neighbours, summed over objectives.

  Infinity at the ends, so that these stay.
  """
  count, distance = len(values), np.zeros(len(values))
  for column in np.asarray(values, np.float64).T:
    order = np.argsort(column, kind="stable")
    distance[order[:1]] = distance[order[-1:]] = np.inf
    if count > 2:
      distance[order[1:-1]] += column[order[2:]] - column[order[:-2]]
  return distance


def normalised(
  values: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
  """Values (N, M) with 0 at `low` and 1 at `high` (M,)."""
  span = np.where(high > low, np.asarray(high) - low, 1.0)
  return (np.asarray(values, np.float64) - low) / span


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
  """Volume of what points dominate up to a reference, exactly.

  By sweeping over the last objective, and over the one before it; of N points
  in 4 objectives some N^2 log N steps.

  Args:
    values: (N, M), M from 1 to 4.
    reference: (M,); points that are not better in every objective add nothing.

  Raises:
    InputError: there are more objectives.
  """
  values, reference = _checked(values), np.asarray(reference, np.float64)
  if reference.shape != values.shape[1:]:
    raise InputError("reference: give one value for each objective")
  if not 1 <= values.shape[1] <= 4:
    raise InputError(
      f"{values.shape[1]} objectives: the hypervolume takes 1 to 4"
    )
  values = values[(values < reference).all(1)]
  if not len(values):
    return 0.0
  return _volume(np.unique(values[front(values)], axis=0), reference)


def regret(found: np.ndarray, best: np.ndarray, reference: np.ndarray) -> float:
  """Share of the best front's hypervolume that a search has not found.

  Args:
    found: (N, M) values of a search.
    best: (K, M) values of the whole space, or of its front.
    reference: (M,) as for `hypervolume`.

  Returns:
    0 where all of it is found, 1 where nothing is.
  """
  whole = hypervolume(best, reference)
  if whole == 0:
    raise InputError("reference: no point of the best front is better than it")
  return 1 - hypervolume(found, reference) / whole


def epsilon(found: np.ndarray, best: np.ndarray) -> float:
  """How much every found point must improve to cover the best front.

  The additive indicator: the largest distance of a point of the front from the
  found point that is nearest in its worst objective.
  """
  best = _checked(best)[front(best)]
  found = _checked(found)
  found = found[np.isfinite(found).all(1)]
  if not len(found):
    return float("inf")
  worst = (found[None] - best[:, None]).max(2)
  return float(max(worst.min(1).max(), 0.0))


def _volume(values: np.ndarray, reference: np.ndarray) -> float:
  """Of points that differ and do not dominate each other."""
  count = values.shape[1]
  if count == 1:
    return float(reference[0] - values.min())
  if count == 2:
    total, y = 0.0, reference[1]
    for point in values[np.argsort(values[:, 0])]:
      if point[1] < y:
        total += (reference[0] - point[0]) * (y - point[1])
        y = point[1]
    return float(total)
  order = np.argsort(values[:, -1], kind="stable")
  values, total = values[order], 0.0
  tops = [*values[1:, -1], reference[-1]]
  if count == 3:
    stairs = _Stairs(*reference[:2])
    for (x, y, z), top in zip(values.tolist(), tops):
      stairs.add(x, y)
      total += stairs.area * (top - z)
    return float(total)
  for at, top in enumerate(tops):
    height = top - values[at, -1]
    if height > 0:
      total += height * hypervolume(values[: at + 1, :-1], reference[:-1])
  return float(total)


class _Stairs:
  """The area that points of a plane dominate, point by point."""

  def __init__(self, x: float, y: float):
    self.area = 0.0
    # Corners rise in x and fall in y, between ends that no point reaches.
    self._xs, self._ys = [-np.inf, x], [y, -np.inf]

  def add(self, x: float, y: float) -> None:
    at = bisect.bisect_left(self._xs, x)
    if self._ys[at - 1] <= y or (self._xs[at] == x and self._ys[at] <= y):
      return
    left, top = x, self._ys[at - 1]
    end = at
    while self._ys[end] >= y:
      self.area += (self._xs[end] - left) * (top - y)
      left, top = self._xs[end], self._ys[end]
      end += 1
    self.area += (self._xs[end] - left) * (top - y)
    self._xs[at:end], self._ys[at:end] = [x], [y]


def _checked(values: np.ndarray) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 2:
    raise InputError("values: give an array (points, objectives)")
  if np.isnan(values).any():
    raise InputError("values: one is NaN; give infinity where there is none")
  return values
