"""What draws say: point predictions, intervals, and how true they are.

On the host in float64. Draws that are no number (NaN, or INVALID) are left
out, and their share is told. Shapes by axis letter: B texts, S draws, O
objectives; all functions take draws along the second axis.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from research.predictors.number_scale import NumberScale

# So many truths may make intervals narrower.
_MANY = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """Draws for B texts, and what follows from them.

  Attributes:
    samples: (B, S, O) float64, NaN where a draw is no number.
    level: probability of the interval.
    margins: of the interval, learned by `Margins.fit`; None leaves it.
  """

  samples: np.ndarray
  level: float = 0.9
  margins: "Margins | None" = None

  @property
  def mean(self) -> np.ndarray:
    """(B, O) mean of the draws."""
    count = np.sum(~np.isnan(self.samples), axis=1)
    total = np.nansum(self.samples, axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)

  @property
  def median(self) -> np.ndarray:
    """(B, O) median of the draws."""
    return self.quantile(0.5)

  @property
  def low(self) -> np.ndarray:
    """(B, O) lower end of the central interval."""
    return self._end((1 - self.level) / 2, -1)

  @property
  def high(self) -> np.ndarray:
    """(B, O) upper end of the central interval."""
    return self._end((1 + self.level) / 2, 1)

  def _end(self, share: float, side: int) -> np.ndarray:
    found = self.quantile(share)
    return found if self.margins is None else self.margins.widen(found, side)

  def quantile(self, share: float) -> np.ndarray:
    """(B, O) quantile of the draws, as `quantile`."""
    return quantile(self.samples, share)


@dataclasses.dataclass(frozen=True)
class Margins:
  """How far the ends of intervals move, so that they cover what they say.

  Conformalized quantile regression (Romano et al. 2019, arXiv:1905.03222): the
  distances by which the intervals of held-out texts miss their truths tell by
  how much others must be wider. Only many truths make them narrower too: few,
  which often chose the weights as well, err too much. On the scale of
  logarithms where numbers are far apart.

  Attributes:
    level: probability of the interval.
    margins: of each objective, on its scale.
    scales: of each objective.
  """

  level: float
  margins: tuple[float, ...]
  scales: tuple[NumberScale, ...]

  @classmethod
  def fit(cls, samples: np.ndarray, truth: np.ndarray, level: float) -> Self:
    """From draws (B, S, O) of held-out texts and their truths (B, O).

    With too few truths for the level, the largest distance is taken.
    """
    low, high = (quantile(samples, (1 + s * level) / 2) for s in (-1, 1))
    return cls.of_ends(low, high, truth, level)

  @classmethod
  def of_ends(
    cls, lows: np.ndarray, highs: np.ndarray, truth: np.ndarray, level: float,
    scales: Sequence[NumberScale | None] | None = None,
  ) -> Self:  # fmt: skip
    """From intervals [lows, highs] (B, O) of held-out texts and their truths.

    Args:
      lows: (B, O).
      highs: (B, O).
      truth: (B, O).
      level: probability of the interval.
      scales: of each objective; None takes that of its truths.
    """
    given = scales or [None] * truth.shape[1]
    margins, scales = [], []
    for place in range(truth.shape[1]):
      low, high, y = lows[:, place], highs[:, place], truth[:, place]
      scale = given[place] or NumberScale.of(y)
      known = np.isfinite(y) & np.isfinite(low) & np.isfinite(high)
      low, high, y = (scale.forward(v[known]) for v in (low, high, y))
      missed = np.sort(np.maximum(low - y, y - high))
      wanted = math.ceil((len(missed) + 1) * level) - 1
      margin = missed[min(wanted, len(missed) - 1)] if len(missed) else 0.0
      few = len(missed) < _MANY
      margins.append(max(float(margin), 0.0) if few else float(margin))
      scales.append(scale)
    return cls(level, tuple(margins), tuple(scales))

  def to_json(self) -> dict[str, Any]:
    """For `from_json`."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Any) -> Self:
    """What `to_json` gave."""
    scales = tuple(NumberScale(**scale) for scale in value["scales"])
    return cls(value["level"], tuple(value["margins"]), scales)

  def widen(self, ends: np.ndarray, side: int) -> np.ndarray:
    """Ends (B, O) of intervals, moved down for side -1 and up for side 1."""
    found = np.empty_like(ends)
    for place, (margin, scale) in enumerate(zip(self.margins, self.scales)):
      told = scale.forward(ends[:, place]) + side * margin
      found[:, place] = scale.back(told)
    return found


def quantile(samples: np.ndarray, share: float) -> np.ndarray:
  """Quantile of draws (B, S, ...) by linear interpolation: (B, ...).

  NaN is left out, infinite draws keep their order; NaN where none is left.
  """
  ordered = np.sort(np.asarray(samples, np.float64), axis=1)
  count = np.sum(~np.isnan(ordered), axis=1)
  place = share * (np.maximum(count, 1) - 1)
  below = np.floor(place).astype(int)
  above = np.minimum(below + 1, np.maximum(count, 1) - 1)
  take = lambda at: np.take_along_axis(ordered, at[:, None], axis=1)[:, 0]
  low, high = take(below), take(above)
  # Equal neighbours add nothing, also infinite ones, whose difference is no
  # number.
  gap = np.zeros_like(low)
  np.subtract(high, low, out=gap, where=low != high)
  part = np.where(place > below, place - below, 0.0)
  with np.errstate(invalid="ignore"):
    return np.where(part > 0, low + part * gap, low)


def interval_score(
  low: np.ndarray, high: np.ndarray, truth: np.ndarray, level: float
) -> np.ndarray:
  """Winkler's score (B,) of intervals [low, high] (B,): less is better.

  Width, and 2 / (1 - level) times the distance of a truth outside (Gneiting and
  Raftery 2007, eq. 43), in units of the truth. Least where both ends are the
  right quantiles. NaN where the truth is not finite.
  """
  below, above = np.maximum(low - truth, 0), np.maximum(truth - high, 0)
  found = high - low + 2 / (1 - level) * (below + above)
  return np.where(np.isfinite(truth), found, np.nan)


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Continuous ranked probability score of draws (B, S) for truth (B,): (B,).

  E|X - y| - E|X - X'| / 2 (Gneiting and Raftery 2007, eq. 21), the second mean
  over pairs of different draws, so that the number of draws does not shift the
  score (Ferro 2014). In units of the truth; less is better. Draws that are not
  finite are left out; NaN where the truth is not finite or no draw is left.
  """
  finite = np.isfinite(samples)
  ordered = np.sort(np.where(finite, samples, np.nan), axis=1)
  there = ~np.isnan(ordered)
  count = there.sum(axis=1)
  values = np.where(there, ordered, 0.0)
  n = np.maximum(count, 1)
  ranks = 2 * np.arange(samples.shape[1])[None] - (n[:, None] - 1)
  spread = np.sum(np.where(there, ranks * values, 0.0), axis=1)
  spread = spread / np.maximum(n * (n - 1) / 2, 1)
  known = np.isfinite(truth) & (count > 0)
  target = np.where(known, truth, 0.0)
  distance = np.sum(np.where(there, np.abs(values - target[:, None]), 0), 1)
  return np.where(known, distance / n - spread / 2, np.nan)


def coverage(samples: np.ndarray, truth: np.ndarray, level: float) -> float:
  """Share of finite truths (B,) in the central interval of draws (B, S)."""
  low = quantile(samples, (1 - level) / 2)
  high = quantile(samples, (1 + level) / 2)
  known = np.isfinite(truth) & ~np.isnan(low)
  inside = (truth >= low) & (truth <= high)
  return float(np.mean(inside[known])) if known.any() else float("nan")


def weighted_crps(
  atoms: np.ndarray, chances: np.ndarray, truth: np.ndarray
) -> np.ndarray:
  """CRPS (B,) of discrete distributions, exactly.

  E|X - y| - E|X - X'| / 2 over all pairs, since chances are no draws.

  Args:
    atoms: (B, G) numbers, finite, in any order.
    chances: (B, G) of each, with sum 1.
    truth: (B,); the score is NaN where it is not finite.
  """
  order = np.argsort(atoms, axis=1)
  values = np.take_along_axis(atoms, order, axis=1)
  below = np.cumsum(np.take_along_axis(chances, order, axis=1), axis=1)[:, :-1]
  # E|X - X'| / 2 is the integral of F (1 - F).
  spread = np.sum(np.diff(values, axis=1) * below * (1 - below), axis=1)
  known = np.isfinite(truth)
  target = np.where(known, truth, 0.0)
  distance = np.sum(chances * np.abs(atoms - target[:, None]), axis=1)
  return np.where(known, distance - spread, np.nan)


def weighted_quantile(
  atoms: np.ndarray, chances: np.ndarray, share: float
) -> np.ndarray:
  """The least atom (B,) at which so large a share is reached."""
  order = np.argsort(atoms, axis=1)
  values = np.take_along_axis(atoms, order, axis=1)
  total = np.cumsum(np.take_along_axis(chances, order, axis=1), axis=1)
  at = np.sum(total < share - 1e-9, axis=1)
  at = np.minimum(at, atoms.shape[1] - 1)
  return np.take_along_axis(values, at[:, None], axis=1)[:, 0]
