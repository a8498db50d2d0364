import numpy as np
import pytest

from research.predictors.plausible import Range


def test_the_range_grows_with_the_span_and_shrinks_with_examples():
  accuracies = np.linspace(45, 93, 100)[:, None]
  found = Range.fit(accuracies)
  assert found.low[0] == pytest.approx(45 - 0.3 * 48)
  assert found.high[0] == pytest.approx(93 + 0.3 * 48)
  few = Range.fit(accuracies[[0, 99]])
  assert few.high[0] == pytest.approx(93 + 2.75 * 48)
  # Where none is negative none is plausible; none is known of the second.
  assert few.low[0] == 0
  mixed = Range.fit(np.array([[-1.0, np.nan], [1.0, np.nan]]))
  assert mixed.low[0] < -1 and mixed.high[1] == np.inf
  back = Range.from_json(mixed.to_json())
  np.testing.assert_array_equal(back.low, mixed.low)
  np.testing.assert_array_equal(back.high, mixed.high)
  both = found.joined(Range.fit(np.array([[500.0], [600.0]])))
  assert both.low[0] == found.low[0] and both.high[0] > 600


def test_far_apart_numbers_have_a_range_of_factors():
  found = Range.fit(np.geomspace(1e3, 1e9, 1000)[:, None])
  assert 1e1 < found.low[0] < 1e3 and 1e9 < found.high[0] < 1e11


def test_implausible_draws_become_plausible_ones_of_their_text():
  limits = Range.fit(np.linspace(1, 2, 50)[:, None])
  draws = np.array([[1.2, 1300.0, 1.4, np.nan], [9.0, 9.5, 9.9, 8.0]])[
    ..., None
  ]
  found = limits.cut(draws, seed=0)[..., 0]
  assert found[0, 0] == 1.2 and not found[0, 1] > 1.4
  assert np.isnan(found[0, 3])
  assert (found[1] == limits.high[0]).all()
  endless = np.array([[1.2, np.inf]])[..., None]
  assert limits.cut(endless, seed=0)[0, 1, 0] == 1.2
  assert limits.cut(endless, seed=0, keep_infinite=True)[0, 1, 0] == np.inf
  # Given numbers are left alone.
  free = np.array([[True], [False]])
  found = limits.cut(draws, seed=0, free=free)[..., 0]
  np.testing.assert_array_equal(found[1], draws[1, :, 0])
