"""Which of several values is better: by weights, or anywhere on the front.

Less is better, of every objective. Methods ask a preference for one score a
point; `low` and `high` are the ends of all finite values that a search has
seen, so that objectives count alike whatever their units.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from models.errors import InputError
from research.search import pareto

# Share of the sum in a Chebyshev distance: of two points whose worst objective
# is equal, the better one in the others comes first.
_SUM = 0.05


@dataclasses.dataclass(frozen=True)
class Weighted:
  """The weighted Chebyshev distance from the best values seen.

  Unlike a weighted sum it reaches every point of a front, whatever its shape.

  Attributes:
    weights: of the objectives.
    limits: largest values that are allowed; a point beyond comes after all
      that keep them, by how far it is beyond.
  """

  weights: tuple[float, ...] = (1.0,)
  limits: tuple[float, ...] = ()

  def scores(
    self, values: np.ndarray, low: np.ndarray, high: np.ndarray
  ) -> np.ndarray:
    """Scores (N,) of values (N, M), less being better.

    Raises:
      InputError: there are not as many weights or limits as objectives.
    """
    count = values.shape[1]
    for name in ("weights", "limits"):
      given = getattr(self, name)
      if given and len(given) != count:
        raise InputError(
          f"{name}={given}: give one for each of {count} objectives"
        )
    if count == 1 and not self.limits:
      return values[:, 0]
    z = pareto.normalised(values, low, high)
    weighted = np.asarray(self.weights) * z
    # A weight of zero leaves infinity out of the product.
    weighted = np.where(np.isnan(weighted), 0.0, weighted)
    scores = weighted.max(1) + _SUM * weighted.sum(1)
    if not self.limits:
      return scores
    limits = pareto.normalised(np.asarray([self.limits]), low, high)
    beyond = np.maximum(z - np.where(np.isfinite(limits), limits, np.inf), 0)
    beyond = np.where(np.isnan(beyond), 0.0, beyond).sum(1)
    worst = sum(self.weights) * (1 + _SUM)
    return np.where(beyond > 0, worst + beyond, scores)

  def fan(self, count: int) -> list["Weighted"]:
    """The weights alone that a method with a single aim takes in turn."""
    del count
    return [self]


@dataclasses.dataclass(frozen=True)
class Spread:
  """Every point of the front alike: its rank, then how lonely it is.

  The order of NSGA-II (Deb et al. 2002): points that none dominates, then those
  that only they dominate, and so on; among equals those that are far from
  others.

  Attributes:
    aims: least number of weights that a method with single aims takes.
  """

  aims: int = 8

  def scores(
    self, values: np.ndarray, low: np.ndarray, high: np.ndarray
  ) -> np.ndarray:
    """Scores (N,) of values (N, M), less being better.

    That of a point with an infinite value is infinite.
    """
    if values.shape[1] == 1:
      return values[:, 0]
    ranks = pareto.ranks(values)
    finite = np.isfinite(values).all(1)
    scores = np.where(finite, ranks.astype(np.float64), np.inf)
    z = pareto.normalised(values, low, high)
    for rank in np.unique(ranks[finite]):
      members = np.flatnonzero((ranks == rank) & finite)
      # Between 0, alone, and 1.
      scores[members] += 1 / (2 + pareto.crowding(z[members]))
    return scores

  def fan(self, count: int) -> list[Weighted]:
    """Weights at equal distances, at least `aims` of them."""
    if count == 1:
      return [Weighted()]
    parts = 1
    while math.comb(parts + count - 1, count - 1) < self.aims:
      parts += 1
    return [Weighted(weights) for weights in _lattice(count, parts)]


Preference = Weighted | Spread


def _lattice(count: int, parts: int) -> Sequence[tuple[float, ...]]:
  """All weights of `parts` equal parts; those of zero get a little."""
  found = []
  for cuts in itertools.combinations(range(parts + count - 1), count - 1):
    ends = (-1, *cuts, parts + count - 1)
    shares = [b - a - 1 for a, b in itertools.pairwise(ends)]
    found.append(tuple(max(share / parts, 0.01) for share in shares))
  return found
