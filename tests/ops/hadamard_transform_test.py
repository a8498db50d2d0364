"""Rotations: every size against its whole matrix, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import hadamard_transform
from ops.hadamard_transform import (
  factors,
  hadamard_matrix,
  hadamard_transform_reference,
)
from tests.ops.sequence_op import assert_close, tolerance

# Powers of two; Paley's first (12, 20, 44), his second (28, 36), doubled ones.
SIZES = [1, 2, 8, 128, 256, 12, 20, 28, 36, 40, 44, 56, 80, 192, 320]
rotate = jax.jit(hadamard_transform, static_argnames=("axis", "inverse"))


@pytest.mark.parametrize("size", [*SIZES, 112, 224])
def test_rows_are_orthogonal_and_factors_make_the_whole(size):
  matrix = hadamard_matrix(size)
  assert matrix.shape == (size, size) and set(np.unique(matrix)) <= {-1, 1}
  product = matrix.astype(int) @ matrix.T.astype(int)
  np.testing.assert_array_equal(product, size * np.eye(size, dtype=int))
  whole = np.ones((1, 1), np.int8)
  for part in factors(size):
    assert len(part) <= 128
    whole = np.kron(whole, part)
  np.testing.assert_array_equal(whole, matrix)


@pytest.mark.parametrize(
  "size, widths",
  [(2560, [40, 64]), (5120, [80, 64]), (1536, [48, 32]), (4096, [64, 64]),
   (20480, [20, 32, 32]), (128, [128])],
)  # fmt: skip
def test_published_widths_have_few_factors(size, widths):
  assert [len(part) for part in factors(size)] == widths


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_product_with_the_matrix(size, dtype):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, size)), dtype)
  y = rotate(x)
  assert y.shape == x.shape and y.dtype == dtype
  bound = tolerance(dtype, size)
  assert_close(y, hadamard_transform_reference(x), bound)
  # A rotation: lengths stay, and the inverse comes back.
  assert_close(rotate(y, inverse=True), np.asarray(x, np.float64), 2 * bound)


def test_axes_batches_and_gradients():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(2, 24, 5)), jnp.float32)
  bound = tolerance("float32", 24)
  for axis in (1, -2):
    y = rotate(x, axis=axis)
    assert_close(y, hadamard_transform_reference(x, axis=axis), bound)
  assert_close(jax.vmap(lambda x: hadamard_transform(x, axis=0))(x), y, bound)
  g = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  _, pull = jax.vjp(lambda x: hadamard_transform(x, axis=1), x)
  back = hadamard_transform_reference(g, axis=1, inverse=True)
  assert_close(pull(g)[0], back, bound)


def test_a_product_stays_the_same_and_an_outlier_is_spread():
  rng = np.random.default_rng(2)
  x, w = rng.normal(size=(4, 40)), rng.normal(size=(40, 6))
  x[:, 7] *= 100
  x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
  y = rotate(x) @ rotate(w, axis=-2)
  assert_close(y, np.asarray(x, np.float64) @ np.asarray(w), 1e-5)
  peak = lambda x: np.abs(x).max() / np.sqrt(np.mean(np.square(x)))
  assert peak(rotate(x)) < peak(x) / 2


@pytest.mark.parametrize(
  "x, options, message",
  [
    (jnp.zeros((2, 3)), {}, "no Hadamard matrix of size 3 here"),
    (jnp.zeros((2, 26)), {}, "of size 26"),
    (jnp.zeros((2, 0)), {}, "of size 0"),
    (jnp.zeros((2, 4), int), {}, "int32, not a float"),
    (jnp.zeros((2, 4)), {"axis": 2}, "has no axis 2"),
    (jnp.zeros(4), {"implementation": "mosaic_gpu"}, "usable: xla"),
  ],
)
def test_wrong_arguments(x, options, message):
  with pytest.raises(ValueError, match=message):
    hadamard_transform(x, **options)
