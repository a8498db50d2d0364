"""Numbers as they are, or by their logarithm where they are far apart."""

import dataclasses
from typing import Self

import numpy as np

# Numbers whose largest is so many times the smallest are told by logarithms.
_WIDE = 30


@dataclasses.dataclass(frozen=True)
class NumberScale:
  """How numbers of a data set are told.

  Attributes:
    is_log: by their logarithm.
    unit: 0 for log(x); else for log(1 + x / unit), where numbers begin at 0.
  """

  is_log: bool = False
  unit: float = 0.0

  @classmethod
  def of(cls, values: np.ndarray) -> Self:
    """The scale for all numbers of a data set, NaN left out."""
    known = values[np.isfinite(values)]
    positive = known[known > 0]
    if not len(positive) or known.min() < 0:
      return cls()
    low, high = positive.min(), known.max()
    if high / low <= _WIDE:
      return cls()
    return cls(is_log=True, unit=float(low) if known.min() == 0 else 0.0)

  def forward(self, values: np.ndarray) -> np.ndarray:
    """What is told; numbers below the domain of a logarithm are its lowest."""
    if not self.is_log:
      return values
    if self.unit:
      return np.log1p(np.maximum(values, 0) / self.unit)
    return np.log(np.maximum(values, np.finfo(float).tiny))

  def back(self, told: np.ndarray) -> np.ndarray:
    """The numbers again."""
    if not self.is_log:
      return told
    with np.errstate(over="ignore"):
      return self.unit * np.expm1(told) if self.unit else np.exp(told)
