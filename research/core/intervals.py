"""95% bootstrap intervals (Efron and Tibshirani 1993, chapter 13).

Items, such as windows or examples, are drawn with replacement, and the interval
is between percentiles of what resamples give.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
  """A value and the ends of its 95% interval."""

  value: float
  low: float
  high: float


def bootstrap(
  measure: Callable[..., float],
  *columns: np.ndarray,
  num_samples: int = 200,
  seed: int = 0,
) -> Interval:
  """A measure of columns (B, ...) with its 95% percentile interval.

  Examples are drawn with replacement (Efron and Tibshirani 1993, chapter 13);
  the same seed draws the same examples, so differences of methods are paired.
  """
  generator = np.random.default_rng(seed)
  count = len(columns[0])
  found = []
  for _ in range(num_samples):
    rows = generator.integers(count, size=count)
    found.append(measure(*(column[rows] for column in columns)))
  low, high = np.nanquantile(found, [0.025, 0.975])
  return Interval(measure(*columns), float(low), float(high))


def paired_difference(
  measure: Callable[..., float],
  first: np.ndarray,
  second: np.ndarray,
  truth: np.ndarray,
  *,
  num_samples: int = 200,
  seed: int = 0,
) -> Interval:
  """`measure` of `first` minus that of `second` on the same examples."""
  difference = lambda a, b, y: measure(a, y) - measure(b, y)
  return bootstrap(
    difference, first, second, truth, num_samples=num_samples, seed=seed
  )


def ratio(
  numerators: Sequence[float] | np.ndarray,
  denominators: Sequence[float] | np.ndarray,
  num_samples: int = 10000,
  seed: int = 0,
) -> Interval:
  """Ratio of two sums over windows, with its 95% percentile bootstrap interval.

  sum(numerators) / sum(denominators), windows drawn with replacement (Efron and
  Tibshirani 1993, chapter 13). A window is the unit of resampling, so tokens of
  one window may depend on each other.

  Args:
    numerators: (W,) such as the summed negative log-likelihood of a window.
    denominators: (W,) such as its number of tokens; >= 0 with a positive sum.
    num_samples: resamples.
    seed: of the resampling.

  Returns:
    The ratio on all windows and the 2.5% and 97.5% quantiles over resamples.

  Raises:
    ValueError: shapes differ, W is 0, or a number is not finite or negative.
  """
  sums = np.stack(
    [np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)],
    axis=-1,
  )
  if sums.ndim != 2 or not len(sums) or not np.isfinite(sums).all():
    raise ValueError(f"need finite (W,) pairs with W > 0, got {sums.shape}")
  if (sums[:, 1] < 0).any() or not sums[:, 1].any():
    raise ValueError("denominators must be >= 0 and not all 0")
  generator = np.random.default_rng(seed)
  windows = len(sums)
  # Draws take some 64 MB at a time, however many windows there are.
  chunk = max(1, min(num_samples, (1 << 22) // windows))
  ratios = []
  for start in range(0, num_samples, chunk):
    size = (min(chunk, num_samples - start), windows)
    drawn = sums[generator.integers(windows, size=size, dtype=np.int32)].sum(1)
    # Resamples that hold empty windows alone are left out.
    drawn = drawn[drawn[:, 1] > 0]
    ratios.append(drawn[:, 0] / drawn[:, 1])
  low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
  top, bottom = sums.sum(0)
  return Interval(float(top / bottom), float(low), float(high))


def paired_mean(
  delta_by_window: Sequence[float] | np.ndarray,
  weights: Sequence[float] | np.ndarray | None = None,
  num_samples: int = 10000,
  seed: int = 0,
) -> Interval:
  """Weighted mean of paired differences, with its 95% bootstrap interval.

  Args:
    delta_by_window: (W,) difference of two methods on each window.
    weights: (W,) such as tokens of each window; None weighs all alike.
    num_samples: resamples.
    seed: of the resampling.

  Returns:
    The mean and the ends of its interval; it unpacks as (mean, low, high).

  Raises:
    ValueError: as `ratio`.
  """
  delta = np.asarray(delta_by_window, np.float64)
  if weights is None:
    weights = np.ones_like(delta)
  weights = np.asarray(weights, np.float64)
  if weights.shape != delta.shape:
    raise ValueError(f"weights {weights.shape} do not fit {delta.shape}")
  return ratio(delta * weights, weights, num_samples, seed)
