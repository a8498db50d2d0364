import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import keep_top_channels
from ops.keep_top_channels import keep_top_channels_reference


def make(shape, dtype="float32", seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 13, 96])
def test_matches_reference(dtype, channels):
  x = make((4, 3, channels), dtype)
  keep = np.random.default_rng(1).choice([0.1, 0.4, 0.45, 0.8, 1.0], (4, 3))
  y = jax.jit(keep_top_channels)(x, jnp.asarray(keep, jnp.float32))
  assert y.dtype == x.dtype
  expected = keep_top_channels_reference(np.asarray(x, np.float64), keep)
  # The kept channels are copied, so there is nothing to round.
  np.testing.assert_array_equal(np.asarray(y, np.float64), expected)


def test_count_is_exact_without_ties():
  x = make((2, 520))
  for keep, count in [(0.1, 52), (0.25, 130), (0.999, 520)]:
    y = keep_top_channels(x, keep)
    np.testing.assert_array_equal(jnp.sum(y != 0, axis=-1), count)


def test_keeps_ties_and_both_signs():
  x = jnp.asarray([[3.0, -1.0, 1.0, 0.5, -3.0, 1.0]])
  y = keep_top_channels(x, 0.5)
  np.testing.assert_array_equal(y, [[3.0, -1.0, 1.0, 0.0, -3.0, 1.0]])


def test_keep_one_is_the_identity():
  x = make((3, 17)).at[0].set(0.0)
  np.testing.assert_array_equal(keep_top_channels(x, 1.0), x)
  np.testing.assert_array_equal(keep_top_channels(x, jnp.ones(3)), x)


def test_gradient_passes_kept_channels_only():
  x = make((3, 10))
  keep = jnp.asarray([0.2, 0.5, 1.0])
  y, pullback = jax.vjp(lambda x: keep_top_channels(x, keep), x)
  cotangent = make((3, 10), seed=1)
  (gradient,) = pullback(cotangent)
  np.testing.assert_array_equal(gradient, jnp.where(y != 0, cotangent, 0))


def test_vmap_and_scan_match_batch():
  x = make((4, 2, 30))
  keep = jnp.asarray([0.1, 0.4, 0.7, 1.0])
  batch = keep_top_channels(x, keep[:, None])
  np.testing.assert_array_equal(jax.vmap(keep_top_channels)(x, keep), batch)
  _, scanned = jax.lax.scan(
    lambda c, xs: (c, keep_top_channels(*xs)), None, (x, keep)
  )
  np.testing.assert_array_equal(scanned, batch)


def test_second_implementation_does_not_exist():
  with pytest.raises(ValueError, match="mosaic_gpu"):
    keep_top_channels(make((1, 4)), 0.5, implementation="mosaic_gpu")


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5])
def test_share_out_of_range(keep):
  with pytest.raises(ValueError, match="keep is"):
    keep_top_channels(make((1, 4)), keep)
