"""Measures of predictions, with bootstrap intervals.

Shapes by axis letter: B examples, R resamples.
"""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats

from research.core.metrics import Interval

Measure = Callable[..., float]


def spearman(prediction: np.ndarray, truth: np.ndarray) -> float:
  """Rank correlation; 0 where either is constant."""
  if _is_constant(prediction) or _is_constant(truth):
    return 0.0
  return float(stats.spearmanr(prediction, truth).statistic)


def kendall(prediction: np.ndarray, truth: np.ndarray) -> float:
  """Kendall's tau-b; 0 where either is constant."""
  if _is_constant(prediction) or _is_constant(truth):
    return 0.0
  return float(stats.kendalltau(prediction, truth).statistic)


def mean_squared_error(prediction: np.ndarray, truth: np.ndarray) -> float:
  """Mean of the squared errors."""
  return float(np.mean(np.square(prediction - truth)))


def mean_absolute_error(prediction: np.ndarray, truth: np.ndarray) -> float:
  """Mean of the absolute errors."""
  return float(np.mean(np.abs(prediction - truth)))


MEASURES: Mapping[str, Measure] = {
  "spearman": spearman,
  "kendall": kendall,
  "mse": mean_squared_error,
  "mae": mean_absolute_error,
}


def _is_constant(values: np.ndarray) -> bool:
  return len(values) < 2 or np.ptp(values) == 0


def without_gaps(prediction: np.ndarray) -> np.ndarray:
  """Predictions (B,), the median of all where one is not finite.

  An example that a model has no number for must not leave the comparison.
  """
  finite = np.isfinite(prediction)
  fill = np.median(prediction[finite]) if finite.any() else 0.0
  return np.where(finite, prediction, fill)


def bootstrap(
  measure: Measure,
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
  measure: Measure,
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
