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


def test_the_interval_covers_about_as_often_as_it_says():
  generator = np.random.default_rng(0)
  covered = 0
  for seed in range(60):
    truth = generator.normal(size=60)
    prediction = truth + generator.normal(size=60)
    found = measures.bootstrap(
      measures.mean_squared_error, prediction, truth, seed=seed
    )
    assert found.low < found.value < found.high
    covered += found.low <= 1.0 <= found.high
  assert 48 <= covered <= 60


def test_differences_are_paired():
  generator = np.random.default_rng(1)
  truth = generator.normal(size=200)
  noise = generator.normal(size=200)
  better, worse = truth + noise, truth + 1.1 * noise
  found = measures.paired_difference(
    measures.mean_squared_error, better, worse, truth
  )
  assert found.high < 0
  alone = measures.bootstrap(measures.mean_squared_error, better, truth)
  assert found.high - found.low < (alone.high - alone.low) / 2
