import math

import numpy as np
import pytest

from research.predictors import calibration
from research.predictors.calibration import Prediction


def test_quantiles_are_numpys_where_all_is_finite():
  samples = np.random.default_rng(0).normal(size=(5, 33, 2))
  for share in (0.0, 0.05, 0.5, 0.77, 1.0):
    np.testing.assert_allclose(
      calibration.quantile(samples, share), np.quantile(samples, share, axis=1)
    )


def test_what_is_no_number_is_left_out():
  nan, inf = math.nan, math.inf
  samples = np.array(
    [[[1.0], [nan], [3.0]], [[nan], [nan], [nan]], [[inf], [inf], [2.0]]]
  )
  found = Prediction(samples, level=1.0)
  np.testing.assert_array_equal(found.median[:, 0], [2.0, nan, inf])
  np.testing.assert_array_equal(found.mean[:, 0], [2.0, nan, inf])
  np.testing.assert_array_equal(found.low[:, 0], [1.0, nan, 2.0])
  np.testing.assert_array_equal(found.high[:, 0], [3.0, nan, inf])


def test_crps_is_the_double_sum():
  generator = np.random.default_rng(1)
  samples, truth = generator.normal(size=(4, 9)), generator.normal(size=4)
  samples[2, 3:] = np.nan
  samples[3, :2] = np.inf
  found = calibration.crps(samples, truth)
  for row, y, value in zip(samples, truth, found):
    row = row[np.isfinite(row)]
    pairs = [abs(a - b) for i, a in enumerate(row) for b in row[:i]]
    assert value == pytest.approx(np.abs(row - y).mean() - np.mean(pairs) / 2)
  assert np.isnan(calibration.crps(samples[:1], np.array([np.nan])))[0]
  single = calibration.crps(np.array([[2.0]]), np.array([5.0]))
  assert single == [3.0]


def test_crps_of_a_normal_is_its_closed_form_and_does_not_shift_with_draws():
  """E over y of the CRPS of N(0, 1) is 1 / sqrt(pi)."""
  generator = np.random.default_rng(2)
  for draws in (2, 50):
    samples = generator.normal(size=(20000, draws))
    found = calibration.crps(samples, generator.normal(size=20000)).mean()
    assert found == pytest.approx(1 / math.sqrt(math.pi), abs=0.015)


def test_coverage_of_calibrated_draws():
  generator = np.random.default_rng(3)
  samples = generator.normal(size=(4000, 200))
  truth = generator.normal(size=4000)
  # Four standard deviations of a share of 4000.
  for level in (0.5, 0.9):
    found = calibration.coverage(samples, truth, level)
    assert abs(found - level) < 4 * math.sqrt(0.25 / 4000) + 0.01
  narrow = calibration.coverage(0.5 * samples, truth, 0.9)
  assert narrow < 0.75
  assert math.isnan(calibration.coverage(samples[:1], np.array([np.nan]), 0.9))


def test_scores_of_distributions_are_the_double_sum_over_all_pairs():
  generator = np.random.default_rng(4)
  atoms = generator.normal(size=(3, 6))
  chances = generator.dirichlet(np.ones(6), size=3)
  truth = np.array([0.3, -5.0, np.nan])
  found = calibration.weighted_crps(atoms, chances, truth)
  for a, p, y, value in zip(atoms, chances, truth, found):
    pairs = p[:, None] * p[None] * np.abs(a[:, None] - a[None])
    wanted = np.sum(p * np.abs(a - y)) - pairs.sum() / 2
    np.testing.assert_allclose(value, wanted)
  # Every draw as likely: the same as draws, but for pairs of one with itself.
  even = np.full((3, 6), 1 / 6)
  spread = np.abs(atoms[:, :, None] - atoms[:, None]).sum((1, 2)) / 2
  gap = spread / 30 - spread / 36
  np.testing.assert_allclose(
    calibration.weighted_crps(atoms, even, truth)[:2],
    (calibration.crps(atoms, truth) + gap)[:2],
  )


def test_quantiles_of_distributions_are_the_least_that_reach_the_share():
  atoms = np.array([[3.0, 1.0, 2.0]])
  chances = np.array([[0.2, 0.5, 0.3]])
  for share, wanted in ((0.05, 1), (0.5, 1), (0.6, 2), (0.8, 2), (0.95, 3)):
    assert calibration.weighted_quantile(atoms, chances, share) == wanted


@pytest.mark.parametrize("wide", [False, True])
def test_calibrated_intervals_cover_what_they_say(wide):
  generator = np.random.default_rng(5)
  center = generator.normal(size=(4000, 1))
  truth = center + generator.normal(size=(4000, 1))
  # Draws that are far too sure of themselves, and off.
  draws = center + 0.1 + 0.2 * generator.normal(size=(4000, 50))
  if wide:
    truth, draws = np.exp(3 * truth), np.exp(3 * draws)
  held_out, rest = draws[:2000, :, None], draws[2000:, :, None]
  margins = calibration.Margins.fit(held_out, truth[:2000], 0.9)
  inside = lambda found: np.mean(
    (found.low <= truth[2000:]) & (truth[2000:] <= found.high)
  )
  assert inside(Prediction(rest, 0.9)) < 0.4
  assert inside(Prediction(rest, 0.9, margins)) == pytest.approx(0.9, abs=0.02)
  again = calibration.Margins.from_json(margins.to_json())
  assert again == margins
  assert margins.scales[0].is_log == wide


def test_margins_of_few_or_no_truths():
  draws = np.zeros((3, 5, 2))
  truth = np.array([[1.0, np.nan], [-2.0, np.nan], [0.5, np.nan]])
  margins = calibration.Margins.fit(draws, truth, 0.9)
  assert margins.margins == (2.0, 0.0)
  # Intervals that are too wide become narrower by many truths alone.
  wide = np.broadcast_to(np.linspace(-9, 9, 40), (400, 40))[..., None]
  truth = np.random.default_rng(6).normal(size=(400, 1))
  fit = lambda n: calibration.Margins.fit(wide[:n], truth[:n], 0.9).margins[0]
  assert fit(20) == 0 and fit(400) < -5


def test_interval_scores_are_least_at_the_right_quantiles():
  truth = np.array([0.0, 3.0, -1.0, np.nan])
  found = calibration.interval_score(
    np.zeros(4), np.full(4, 2.0), truth, level=0.9
  )
  np.testing.assert_allclose(found, [2, 2 + 20, 2 + 20, np.nan])
  draws = np.random.default_rng(0).normal(size=100000)
  score = lambda end: np.mean(
    calibration.interval_score(np.full(100000, -end), end, draws, 0.9)
  )
  assert score(1.645) < min(score(1.3), score(2.0))
