"""Numbers about a model, with how sure they are."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from research.core import intervals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A number about a model, with how sure it is.

  Attributes:
    metric: its name.
    value: over all items.
    stderr: standard error; None where there is one item.
    low: lower end of the 95% bootstrap interval over items.
    high: upper end.
    items: questions or windows it is a mean over.
  """

  metric: str
  value: float
  stderr: float | None
  low: float
  high: float
  items: int


def estimate(
  metric: str,
  numerators: Sequence[float] | np.ndarray,
  denominators: Sequence[float] | np.ndarray | None = None,
  transform: Callable[[float], float] = float,
  slope: Callable[[float], float] = lambda value: 1.0,
) -> Estimate:
  """A ratio of sums over items, or a function of it.

  The standard error is that of a ratio of means (Cochran 1977, eq. 2.39, no
  finite-population term); without denominators it is the sample deviation
  over sqrt(n), as in lm-evaluation-harness.

  Args:
    metric: name of the result.
    numerators: (n,) one an item.
    denominators: (n,) such as tokens; None counts items.
    transform: a rising function of the ratio.
    slope: its derivative, as a function of the transformed value.
  """
  numerators = np.asarray(numerators, np.float64)
  if denominators is None:
    denominators = np.ones_like(numerators)
  denominators = np.asarray(denominators, np.float64)
  ratio, low, high = intervals.ratio(numerators, denominators)
  count, value = len(numerators), transform(ratio)
  stderr = None
  if count > 1:
    rest = numerators - ratio * denominators
    spread = math.sqrt(np.sum(rest**2) * count / (count - 1))
    stderr = slope(value) * spread / denominators.sum()
  return Estimate(
    metric=metric,
    value=value,
    stderr=stderr,
    low=transform(low),
    high=transform(high),
    items=count,
  )
