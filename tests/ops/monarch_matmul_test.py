"""Monarch products against loops over values, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import monarch_matmul
from ops.butterfly_matmul import butterfly_matmul_reference, twiddle_shape
from ops.butterfly_matmul import xla as butterfly
from ops.monarch_matmul import init_monarch, monarch_matmul_reference
from tests.ops.complex_arrays import assert_alike, wide
from tests.ops.sequence_op import EPSILON, assert_close, tolerance

# In and out features, then both factors' shapes: square, with padding at either
# side, with one block, and with blocks that the permutation cuts differently.
CASES = {
  "square": (16, 16, (4, 4, 4), (4, 4, 4)),
  "padded": (10, 23, (3, 4, 4), (3, 8, 4)),
  "whole": (5, 3, (1, 5, 5), (1, 3, 5)),
  "uneven": (12, 14, (4, 3, 3), (2, 7, 6)),
}
RUNS = [
  *((case, "float32") for case in CASES),
  ("padded", "bfloat16"),
  ("uneven", "complex64"),
]


@functools.partial(jax.jit, static_argnums=4)
def pull(x, first, second, dy, outputs):
  run = functools.partial(monarch_matmul, out_features=outputs)
  y, back = jax.vjp(run, x, first, second)
  return y, back(dy)


def draw(case, dtype):
  features, outputs, first, second = CASES[case]
  rng = np.random.default_rng(len(case))

  def values(*shape):
    own = rng.normal(size=(2, *shape))
    own = own[0] + 1j * own[1] if dtype == "complex64" else own[0]
    return jnp.asarray(own, dtype)

  shapes = (5, features), first, second, (5, outputs)
  return [values(*shape) for shape in shapes]


def bound(dtype, first, second):
  """Two sums; complex ones of four times as many products."""
  terms = first.shape[-1] + second.shape[-1] + 5
  if dtype != "bfloat16":
    return tolerance("float32", terms * (4 if dtype == "complex64" else 1))
  return tolerance("float32", terms) + 4 * EPSILON[dtype] * 2**0.5


@pytest.mark.parametrize("case, dtype", RUNS)
def test_product_and_gradients(case, dtype):
  outputs = CASES[case][1]
  arrays = x, first, second, dy = draw(case, dtype)
  y, gradients = pull(*arrays, outputs)
  limit = bound(dtype, first, second)
  assert y.dtype == x.dtype
  run = functools.partial(monarch_matmul_reference, out_features=outputs)
  exact = [wide(array) for array in (x, first, second)]
  assert_alike(y, run(*exact), limit)
  # Linear in every entry of an array: what one entry alone makes is its slope.
  for at, found in enumerate(gradients):
    assert found.dtype == arrays[at].dtype
    slope = np.zeros(exact[at].shape, exact[at].dtype)
    for entry in np.ndindex(*slope.shape):
      unit = np.zeros(slope.shape)
      unit[entry] = 1
      moved = run(*exact[:at], unit, *exact[at + 1 :])
      slope[entry] = np.sum(wide(dy) * moved)
    assert_alike(found, slope, limit)


def test_rows_of_any_rank_and_vmap():
  x, first, second, _ = draw("uneven", "float32")

  @jax.jit
  def run(x):
    alone = jax.vmap(monarch_matmul, (0, None, None))(x, first, second)
    return monarch_matmul(x[None, :, None], first, second), alone, x[:0]

  y, alone, none = run(x)
  exact = monarch_matmul_reference(wide(x), wide(first), wide(second))
  limit = bound("float32", first, second)
  assert_close(y, exact[None, :, None], limit)
  assert_close(alone, exact, limit)
  assert monarch_matmul(none, first, second).shape == (0, 14)


def test_it_is_the_dense_product():
  x, first, second, _ = draw("padded", "float32")

  @jax.jit
  def run(x):
    whole = monarch_matmul(jnp.eye(10), first, second)
    return monarch_matmul(x, first, second), whole

  y, whole = run(x)
  assert_close(y, wide(x) @ wide(whole), 2 * bound("float32", first, second))


def test_a_butterfly_is_one():
  rng = np.random.default_rng(0)
  twiddle = rng.normal(size=twiddle_shape(32, 32)).astype(np.float32)
  x = rng.normal(size=(3, 32)).astype(np.float32)

  @jax.jit
  def run(x, twiddle):
    low = butterfly.group_matrix(twiddle[:, 0], (0, 3), True)[0, :, 0]
    high = butterfly.group_matrix(twiddle[:, 0], (3, 5), True)[0, 0]
    assert low.shape == (4, 8, 8) and high.shape == (8, 4, 4)
    return monarch_matmul(x, low, high)

  exact = butterfly_matmul_reference(wide(x), wide(twiddle))
  assert_close(run(x, twiddle), exact, tolerance("float32", 12))


def test_init():
  first, second = init_monarch(jax.random.key(0), 1000, 300)
  assert first.shape == (32, 10, 32) and second.shape == (32, 10, 10)
  for factor in (first, second):
    variance = np.mean(np.square(wide(factor))) * factor.shape[-1]
    assert abs(variance - 1) < 4 * (2 / factor.size) ** 0.5
  first, second = init_monarch(
    jax.random.key(0), 8, 40, blocks=2, dtype=jnp.complex64
  )
  assert first.shape == (2, 4, 4) and second.shape == (2, 20, 4)
  assert first.dtype == second.dtype == jnp.complex64
  with pytest.raises(ValueError, match="8 to 40 channels by 0 blocks"):
    init_monarch(jax.random.key(0), 8, 40, blocks=0)


@pytest.mark.parametrize(
  "x, first, second, options, message",
  [
    ((2, 5), (2, 2, 2), (2, 2, 2), {}, "x is (2, 5), not (..., C) with C of 1"),
    ((2, 4), (2, 2), (2, 2, 2), {}, "first is (2, 2), not (K, Q, P)"),
    ((2, 4), (2, 2, 2), (2, 0, 2), {}, "second is (2, 0, 2), not (L, S, R)"),
    ((2, 4), (2, 2, 2), (3, 2, 2), {},
     "second (3, 2, 2) takes 3 x 2 values, of which first (2, 2, 2) gives 2 x"),
    ((2, 4), (2, 2, 2), (2, 2, 2), {"out_features": 5},
     "out_features is 5, not of 1 to 4"),
    ((2, 4), (2, 2, 2), (2, 2, 2), {"implementation": "mosaic_gpu"},
     "usable: xla"),
  ],
)  # fmt: skip
def test_wrong_arguments(x, first, second, options, message):
  with pytest.raises(ValueError) as caught:
    monarch_matmul(*map(jnp.zeros, (x, first, second)), **options)
  assert message in str(caught.value)


def test_integers_are_refused():
  one = jnp.ones((1, 1, 1))
  with pytest.raises(ValueError, match="x is int32, not of a float dtype"):
    monarch_matmul(jnp.ones(1, int), one, one)
