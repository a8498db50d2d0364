"""95% intervals: by bootstrap, and of the mean of a few seeds.

For the bootstrap (Efron and Tibshirani 1993, chapter 13) items, such as windows
or examples, are drawn with replacement, and the interval is between percentiles
of what resamples give.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom. More
# seeds than these take the last one, whose intervals are a little too wide.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# Counts of windows in resamples that are drawn at once.
_AT_ONCE = 1 << 23


class Interval(NamedTuple):
  """A value and the ends of its 95% interval."""

  value: float
  low: float
  high: float


def spread(values: Sequence[float]) -> float:
  """Standard deviation between seeds: 0 of one, NaN if one is not finite."""
  if not all(map(math.isfinite, values)):
    return math.nan
  return statistics.stdev(values) if len(values) > 1 else 0.0


def of_mean(values: Sequence[float]) -> Interval:
  """The mean of seeds and its interval by Student's t; of one seed, a point.

  The interval is NaN where a value is not finite.
  """
  mean, count = statistics.mean(values), len(values)
  if count == 1:
    return Interval(mean, mean, mean)
  half = _T[min(count - 1, len(_T)) - 1] * spread(values)
  half /= count**0.5
  return Interval(mean, mean - half, mean + half)


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
  top = np.asarray(numerators, np.float64)
  bottom = np.asarray(denominators, np.float64)
  if top.ndim != 1 or not len(top) or top.shape != bottom.shape:
    raise ValueError(f"need (W,) with W > 0, got {top.shape}, {bottom.shape}")
  if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
    raise ValueError("the sums of a window are not finite")
  if (bottom < 0).any() or not bottom.any():
    raise ValueError("denominators must be >= 0 and not all 0")
  ratios = []
  for counts in _resamples(len(top), num_samples, seed):
    drawn = counts @ bottom
    # Resamples that hold empty windows alone are left out.
    ratios.append((counts @ top)[drawn > 0] / drawn[drawn > 0])
  low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
  return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def _resamples(
  windows: int, num_samples: int, seed: int
) -> Iterable[np.ndarray]:
  """How often resamples hold each window, in parts (n, W)."""
  at_once = max(1, min(num_samples, _AT_ONCE // windows))
  if at_once == num_samples:
    return [_all_resamples(windows, num_samples, seed)]
  generator = np.random.default_rng(seed)
  return (
    _counts(generator, windows, min(at_once, num_samples - start))
    for start in range(0, num_samples, at_once)
  )


# The same resamples serve all comparisons on the same windows, of which an
# evaluation makes many; to draw them takes longer than to sum them up.
@functools.lru_cache(maxsize=2)
def _all_resamples(windows: int, num_samples: int, seed: int) -> np.ndarray:
  return _counts(np.random.default_rng(seed), windows, num_samples)


def _counts(generator, windows: int, count: int) -> np.ndarray:
  shape = (count, windows)
  drawn = generator.integers(windows, size=shape, dtype=np.int32)
  drawn = drawn + windows * np.arange(count)[:, None]
  counts = np.bincount(drawn.reshape(-1), minlength=count * windows)
  return counts.reshape(shape).astype(np.float32)


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
