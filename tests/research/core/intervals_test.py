import math

import numpy as np
import pytest

from research.core import intervals
from research.predictors import measures


def test_the_interval_covers_about_as_often_as_it_says():
  generator = np.random.default_rng(0)
  covered = 0
  for seed in range(60):
    truth = generator.normal(size=60)
    prediction = truth + generator.normal(size=60)
    found = intervals.bootstrap(
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
  found = intervals.paired_difference(
    measures.mean_squared_error, better, worse, truth
  )
  assert found.high < 0
  alone = intervals.bootstrap(measures.mean_squared_error, better, truth)
  assert found.high - found.low < (alone.high - alone.low) / 2


def test_bootstrap_intervals_cover_as_often_as_they_say():
  generator = np.random.default_rng(0)
  runs, covered, widths = 400, 0, []
  for seed in range(runs):
    sample = generator.normal(0.3, 2.0, size=60)
    mean, low, high = intervals.paired_mean(sample, num_samples=500, seed=seed)
    assert low < mean < high
    np.testing.assert_allclose(mean, sample.mean())
    covered += low <= 0.3 <= high
    widths.append(high - low)
  # Three standard deviations of a binomial share, below the nominal 95% by
  # what the percentile interval of 60 draws loses (its width has no t-factor).
  assert 0.935 - 3 * np.sqrt(0.95 * 0.05 / runs) < covered / runs < 0.985
  expected = 2 * 1.96 * 2.0 / np.sqrt(60)
  np.testing.assert_allclose(np.mean(widths), expected, rtol=0.05)


def test_windows_are_the_unit_and_tokens_the_weight():
  nll, tokens = np.array([10.0, 60.0, 5.0]), np.array([10, 20, 10])
  ratio = intervals.ratio(nll, tokens, num_samples=200)
  assert ratio.value == 75 / 40
  same = intervals.paired_mean(nll / tokens, tokens, num_samples=200)
  np.testing.assert_allclose(same, ratio)
  assert 0.5 <= ratio.low < ratio.high <= 3.0


def test_the_bootstrap_is_seeded_and_does_not_depend_on_chunks():
  delta = np.random.default_rng(1).normal(size=30_000)
  first = intervals.paired_mean(delta, num_samples=300, seed=5)
  assert first == intervals.paired_mean(delta, num_samples=300, seed=5)
  assert first != intervals.paired_mean(delta, num_samples=300, seed=6)
  half = 1.96 / np.sqrt(30_000)
  np.testing.assert_allclose(first.high - first.value, half, rtol=0.25)


@pytest.mark.parametrize(
  "delta, weights",
  [([], None), ([1.0, np.nan], None), ([1.0], [1.0, 2.0]), ([1.0], [0.0])],
)
def test_bootstrap_refuses_what_has_no_mean(delta, weights):
  with pytest.raises(ValueError):
    intervals.paired_mean(delta, weights)


def test_seeds_that_are_not_finite_have_no_spread():
  assert intervals.spread([1.0, 2.0, 3.0]) == 1
  assert intervals.spread([4.0]) == 0
  for gap in (math.inf, math.nan):
    assert math.isnan(intervals.spread([1.0, gap]))
    assert math.isnan(intervals.of_mean([1.0, gap]).low)
