"""Fourier mixing: both forms against the double sum, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch, fourier_mix
from ops.fourier_mix import choose, fourier_mix_reference
from tests.ops.sequence_op import EPSILON, assert_close, tolerance

FORMS = ["xla_dft", "xla_fft"]
# Even and odd, primes, powers of two, and lengths whose halves are empty.
SIZES = [(1, 1), (1, 2), (2, 3), (5, 4), (7, 13), (33, 10)]
RUNS = [(size, "float32") for size in SIZES]
RUNS += [(size, "bfloat16") for size in SIZES[-3:]]


@functools.cache
def program(form):
  def pull(x, dy):
    y, back = jax.vjp(functools.partial(fourier_mix, implementation=form), x)
    return y, back(dy)[0]

  return jax.jit(pull)


def bound(dtype, length, channels):
  """Sums of L D; in bfloat16 two products round what they take and give."""
  walk = tolerance("float32", length * channels)
  return walk if dtype == "float32" else walk + 4 * EPSILON[dtype] * 2**0.5


def draw(dtype, *shape):
  values = np.random.default_rng(sum(shape)).normal(size=(2, *shape))
  return jnp.asarray(values, dtype)


@pytest.mark.parametrize("size, dtype", RUNS)
@pytest.mark.parametrize("form", FORMS)
def test_transform_and_gradient(form, size, dtype):
  x, dy = draw(dtype, 2, *size)
  y, dx = program(form)(x, dy)
  assert y.dtype == dx.dtype == dtype
  limit = bound(dtype, *size)
  # It is symmetric, so that its transpose is itself.
  assert_close(y, fourier_mix_reference(x), limit)
  assert_close(dx, fourier_mix_reference(dy), limit)


def test_the_reference_is_numpys():
  x = np.asarray(draw("float32", 3, 6, 9), np.float64)
  exact = np.fft.fftn(x, axes=(-2, -1)).real
  assert_close(fourier_mix_reference(x), exact, 1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_batches_vmap_and_second_derivatives(form):
  x, way = draw("float32", 2, 5, 6)
  run = functools.partial(fourier_mix, implementation=form)
  exact = fourier_mix_reference(x)
  limit = bound("float32", 5, 6)
  assert_close(jax.jit(jax.vmap(run))(x), exact, limit)
  assert_close(jax.jit(run)(x[:0]), exact[:0], limit)
  # Of half the sum of squares: the transform twice, of any direction.
  energy = lambda x: 0.5 * jnp.sum(run(x) ** 2)
  slope = lambda x, way: jax.jvp(jax.grad(energy), (x,), (way,))[1]
  twice = fourier_mix_reference(fourier_mix_reference(way))
  assert_close(jax.jit(slope)(x, way), twice, 2 * limit)


def test_large_sizes_agree_with_numpy():
  x, _ = draw("float32", 1, 130, 257)
  exact = np.fft.fftn(np.asarray(x, np.float64), axes=(-2, -1)).real
  for form in FORMS:
    run = jax.jit(functools.partial(fourier_mix, implementation=form))
    assert_close(run(x), exact, bound("float32", 130, 257))


def test_quadrants_are_joined_as_a_gpu_gathers_them(monkeypatch):
  x, _ = draw("float32", 2, 33, 10)
  run = functools.partial(fourier_mix, implementation="xla_dft")
  joined = jax.jit(run)(x)
  monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
  gathered = jax.jit(lambda x: run(x))(x)
  np.testing.assert_array_equal(gathered, joined)


@pytest.mark.parametrize(
  "size, itemsize, platform, form",
  [
    ((1024, 1024), 2, "gpu", "xla_dft"),
    ((4096, 4096), 2, "gpu", "xla_fft"),
    ((1024, 1024), 4, "gpu", "xla_fft"),
    ((128, 128), 4, "gpu", "xla_dft"),
    ((1024, 1024), 2, "tpu", "xla_dft"),
    ((8192, 8192), 2, "tpu", "xla_fft"),
    ((16, 16), 4, "cpu", "xla_fft"),
  ],
)
def test_choice(size, itemsize, platform, form):
  assert choose(*size, itemsize, platform) == form


@pytest.mark.parametrize(
  "x, implementation, message",
  [
    (jnp.zeros((2, 2), jnp.complex64), None, "complex64, not of a real"),
    (jnp.zeros((2, 2), int), None, "int32, not of a real"),
    (jnp.zeros(3), None, r"x is \(3,\), not \(..., L, D\)"),
    (jnp.zeros((0, 3)), None, r"x is \(0, 3\), not"),
    (jnp.zeros((2, 3)), "mosaic_gpu", "usable: xla, xla_fft, xla_dft"),
  ],
)
def test_wrong_arguments(x, implementation, message):
  with pytest.raises(ValueError, match=message):
    fourier_mix(x, implementation=implementation)
