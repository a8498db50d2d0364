"""The range in which numbers are plausible, learned from training targets.

A model of few examples now and then draws a wrong exponent. Such draws are rare
and far off, so that they hardly move a median but spoil means, CRPS and the
ends of intervals. What lies far outside of all that was seen is drawn anew
instead: the distribution is cut off at the range.

Shapes by axis letter: N examples, B texts, S draws, O objectives.
"""

import dataclasses
import math
from typing import Any, Self

import numpy as np

from research.predictors.number_scale import NumberScale

# Share of the span that may lie beyond either end, and with few examples more.
_BEYOND, _FEW = 0.25, 5.0


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
  """Plausible numbers of each objective.

  Attributes:
    low: (O,) float64.
    high: (O,) float64.
  """

  low: np.ndarray
  high: np.ndarray

  @classmethod
  def fit(cls, values: np.ndarray) -> Self:
    """From training targets (N, O), NaN where missing.

    Beyond the least and the largest number a quarter of their distance is
    plausible, with N numbers 5 / N of it more; on the scale of logarithms where
    numbers are far apart. Where none is negative, none is plausible.
    """
    ends = [_ends(column[np.isfinite(column)]) for column in values.T]
    low, high = np.array(ends, np.float64).reshape(-1, 2).T
    return cls(low, high)

  def joined(self, other: Self) -> Self:
    """The range from the lower of both ends to the higher."""
    return type(self)(
      np.minimum(self.low, other.low), np.maximum(self.high, other.high)
    )

  def to_json(self) -> list[list[float | None]]:
    """[low, high] of each objective; None stands for no end."""
    finite = lambda value: float(value) if math.isfinite(value) else None
    return [[finite(a), finite(b)] for a, b in zip(self.low, self.high)]

  @classmethod
  def from_json(cls, value: Any) -> Self:
    """What `to_json` gave."""
    ends = [(-math.inf if a is None else a, math.inf if b is None else b)
            for a, b in value]  # fmt: skip
    low, high = np.array(ends, np.float64).reshape(-1, 2).T
    return cls(low, high)

  def cut(
    self,
    draws: np.ndarray,
    seed: int,
    free: np.ndarray | None = None,
    *,
    keep_infinite: bool = False,
    first: int = 0,
  ) -> np.ndarray:
    """Draws (B, S, O) of which others of the text replace implausible ones.

    Where no draw of a text is plausible, the nearest end of the range stands
    for each. NaN stays.

    Args:
      draws: of a model.
      seed: of the choice among plausible draws.
      free: (B, O) which numbers were drawn, and not given; None for all.
      keep_infinite: infinities are values of their own, and stay.
      first: place of the first text, on which the choice depends.
    """
    outside = (draws < self.low) | (draws > self.high)
    if keep_infinite:
      outside &= np.isfinite(draws)
    if free is not None:
      outside &= free[:, None]
    wrong = outside.any(axis=-1)
    found = draws.copy()
    for text in np.flatnonzero(wrong.any(axis=1)):
      bad = np.flatnonzero(wrong[text])
      good = np.flatnonzero(~wrong[text])
      if len(good):
        generator = np.random.default_rng((seed, 61, first + int(text)))
        found[text, bad] = draws[text, generator.choice(good, len(bad))]
      else:
        clipped = np.clip(draws[text], self.low, self.high)
        found[text] = np.where(outside[text], clipped, draws[text])
    return found


def _ends(known: np.ndarray) -> tuple[float, float]:
  if not len(known):
    return -math.inf, math.inf
  scale = NumberScale.of(known)
  told = scale.forward(known)
  low, high = told.min(), told.max()
  span = high - low or max(abs(low), 1.0)
  more = span * (_BEYOND + _FEW / len(known))
  ends = scale.back(np.array([low - more, high + more]))
  if known.min() >= 0:
    ends = np.maximum(ends, 0.0)
  if known.max() <= 0:
    ends = np.minimum(ends, 0.0)
  return float(ends[0]), float(ends[1])
