"""Measures of predictions.

Axis letter: B examples.
"""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats

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
