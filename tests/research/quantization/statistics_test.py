import jax.numpy as jnp
import numpy as np
import pytest

from research.quantization.statistics import Statistics, Wanted

X = np.random.default_rng(0).standard_t(3, (2, 50, 3, 4)).astype(np.float32)


def of(x):
  wanted = Wanted(gram=True, percentiles=True)
  return Statistics.of(jnp.asarray(x), wanted)


def test_what_nobody_asked_for_is_left_out():
  found = Statistics.of(jnp.asarray(X), Wanted())
  assert found.histogram is None and found.gram is None
  assert found.merge(found).gram is None
  assert found.percentile(100.0) == np.abs(X).max()


def test_channels_are_all_axes_behind_the_tokens():
  found = of(X)
  rows = X.reshape(100, 12)
  assert found.count == 100
  np.testing.assert_array_equal(found.absmax, np.abs(rows).max(axis=0))
  np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-5, atol=1e-4)


def test_batches_add_up_to_the_whole():
  whole = of(X)
  parts = of(X[:1]).merge(of(X[1:]))
  assert parts.count == whole.count
  np.testing.assert_array_equal(parts.absmax, whole.absmax)
  np.testing.assert_array_equal(parts.histogram, whole.histogram)
  np.testing.assert_allclose(parts.gram, whole.gram, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
def test_a_percentile_is_found_to_within_a_bin(percent):
  found = float(of(X).percentile(percent))
  wanted = np.quantile(np.abs(X), percent / 100, method="higher")
  assert wanted * 0.999 <= found <= wanted * 2 ** (1 / 32) * 1.001


def test_zeros_have_percentiles_too():
  assert of(np.zeros((1, 2, 3))).percentile(99.0) == 0
