import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import fake_quantize
from ops.fake_quantize import fake_quantize_reference

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


def make(shape, dtype="float32", seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 9, 64])
def test_matches_reference(dtype, channels):
  x = make((5, 3, channels), dtype)
  bits = np.random.default_rng(1).integers(2, 18, (5, 3))
  y = jax.jit(fake_quantize)(x, jnp.asarray(bits))
  assert y.dtype == x.dtype
  expected = fake_quantize_reference(np.asarray(x, np.float64), bits)
  # Division, product and the final cast round: at most 4 ulp of the largest.
  largest = np.abs(expected).max(-1, keepdims=True)
  error = np.abs(np.asarray(y, np.float64) - expected) / largest
  assert error.max() <= 4 * EPSILON[dtype]


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_grid_has_the_right_number_of_levels(bits):
  x = jnp.linspace(-1.0, 1.0, 4001)[None]
  y = np.asarray(fake_quantize(x, bits))
  assert np.unique(np.round(y, 6)).size == 2**bits - 1
  assert y.min() == -1.0 and y.max() == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sixteen_bits_is_the_identity(dtype):
  x = make((4, 33), dtype)
  np.testing.assert_array_equal(fake_quantize(x, 16), x)
  bits = jnp.asarray([16.0, 17.0, 16.0, 32.0])
  np.testing.assert_array_equal(fake_quantize(x, bits), x)


def test_zero_rows_stay_zero():
  x = make((3, 8)).at[1].set(0.0)
  for bits in (2, 5, 15, 16):
    y = fake_quantize(x, bits)
    np.testing.assert_array_equal(y[1], 0.0)
    assert jnp.isfinite(y).all()


def test_gradient_is_straight_through():
  x = make((3, 8)).at[1].set(0.0)
  cotangent = make((3, 8), seed=1)
  for bits in (2, 5, 16, jnp.asarray([4, 8, 16])):
    _, pullback = jax.vjp(lambda x, b=bits: fake_quantize(x, b), x)
    np.testing.assert_array_equal(pullback(cotangent)[0], cotangent)


def test_vmap_and_float_bits_match_batch():
  x = make((4, 2, 30))
  bits = jnp.asarray([4, 5, 8, 16])
  batch = fake_quantize(x, bits[:, None])
  np.testing.assert_array_equal(jax.vmap(fake_quantize)(x, bits), batch)
  as_float = fake_quantize(x, bits.astype(jnp.float32)[:, None])
  np.testing.assert_array_equal(as_float, batch)


def test_one_bit_is_refused():
  with pytest.raises(ValueError, match="at least 2"):
    fake_quantize(make((1, 4)), 1)
