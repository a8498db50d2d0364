import numpy as np
import pytest

from research.predictors import measures


def test_measures_by_hand():
  truth = np.array([1.0, 2.0, 3.0, 4.0])
  prediction = np.array([1.0, 3.0, 2.0, 4.0])
  assert measures.kendall(prediction, truth) == pytest.approx(4 / 6)
  assert measures.spearman(prediction, truth) == pytest.approx(0.8)
  assert measures.mean_squared_error(prediction, truth) == 0.5
  assert measures.mean_absolute_error(prediction, truth) == 0.5
  for measure in (measures.kendall, measures.spearman):
    assert measure(np.ones(4), truth) == 0.0
    assert measure(-truth, truth) == pytest.approx(-1)


def test_a_gap_becomes_the_median():
  found = measures.without_gaps(np.array([1.0, np.nan, 5.0, np.inf, 2.0]))
  np.testing.assert_array_equal(found, [1.0, 2.0, 5.0, 2.0, 2.0])
  assert measures.without_gaps(np.array([np.nan])).tolist() == [0.0]
