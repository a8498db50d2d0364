"""Butterflies: every form against loops over pairs, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import butterfly_matmul
from ops.butterfly_matmul import (
  api,
  bit_reversal,
  butterfly_matmul_reference,
  fft_twiddle,
  init_twiddle,
  padded_size,
  tuning,
  twiddle_shape,
)
from tests.ops.complex_arrays import assert_alike, wide
from tests.ops.sequence_op import EPSILON, assert_close, tolerance

FORMS = ["xla_dense", "xla_merged", "xla_radix2"]
# In and out features, blocks, whether strides increase first. 128 channels are
# the fewest that two groups hold.
CASES = {
  "pair": (2, 1, 1, True),
  "stacks": (5, 19, 1, False),
  "groups": (100, 120, 2, True),
  "kaleidoscope": (7, 11, 3, False),
  # The sizes of the kernels: stacks, strides there and back, and results cut.
  "256": (250, 300, 1, True),
  "512": (512, 500, 2, True),
  "1024": (1000, 1024, 1, False),
  "2048": (2048, 3000, 1, True),
  "4096": (4096, 1000, 2, False),
}
# More than a group of `kaleidoscope` has, so that groups meet where strides
# turn.
ROWS = 11
RUNS = [
  *(
    (form, case, "float32")
    for form in FORMS
    for case in ("pair", "stacks", "kaleidoscope")
  ),
  *(
    (form, "kaleidoscope", dtype)
    for form in FORMS
    for dtype in ("bfloat16", "complex64")
  ),
  # Of the three forms one has groups.
  ("xla_merged", "groups", "float32"),
  ("xla_merged", "groups", "bfloat16"),
]
if api.IMPLEMENTATIONS["mosaic_gpu"]() is None:
  KERNEL_CASES = ["groups", *(case for case in CASES if case.isdigit())]
  RUNS += [("mosaic_gpu", case, "bfloat16") for case in KERNEL_CASES]


@functools.cache
def program(form):
  """(y, (dx, dtwiddle)) by a form; compiled once for each case."""

  def pull(x, twiddle, dy, outputs, increasing):
    run = functools.partial(
      butterfly_matmul,
      out_features=outputs,
      increasing_stride=increasing,
      implementation=form,
    )
    y, back = jax.vjp(run, x, twiddle)
    return y, back(dy)

  return jax.jit(pull, static_argnums=(3, 4))


def reference(case):
  _, outputs, _, increasing = CASES[case]
  return functools.partial(
    butterfly_matmul_reference,
    out_features=outputs,
    increasing_stride=increasing,
  )


def bound(dtype, twiddle):
  """A stage adds two terms, complex ones four times as many products."""
  blocks, stages = twiddle.shape[1:3]
  if dtype != "bfloat16":
    terms = 2 * blocks * stages * (4 if dtype == "complex64" else 1)
    return tolerance("float32", terms)
  # Each product rounds its operands and results anew, to either side.
  products = blocks * len(tuning.spans(stages))
  walk = tolerance("float32", 2 * blocks * stages)
  return walk + 4 * EPSILON[dtype] * products**0.5


def draw(case, dtype="float32", rows=ROWS):
  """x, twiddle and a cotangent, of numbers that the dtype holds."""
  features, outputs, blocks, _ = CASES[case]
  rng = np.random.default_rng(len(case))

  def values(dtype, *shape):
    own = rng.normal(size=(2, *shape))
    own = own[0] + 1j * own[1] if dtype == "complex64" else own[0]
    return jnp.asarray(own, dtype)

  shape = twiddle_shape(features, outputs, blocks=blocks)
  twiddle = values("complex64" if dtype == "complex64" else "float32", *shape)
  x, dy = values(dtype, rows, features), values(dtype, rows, outputs)
  return x, twiddle * 0.5, dy


@pytest.mark.parametrize("form, case, dtype", RUNS)
def test_product_and_gradients(form, case, dtype):
  features, outputs, _, increasing = CASES[case]
  x, twiddle, dy = draw(case, dtype)
  y, (dx, dt) = program(form)(x, twiddle, dy, outputs, increasing)
  assert y.dtype == dx.dtype == x.dtype and dt.dtype == twiddle.dtype
  run, limit = reference(case), bound(dtype, twiddle)
  assert_alike(y, run(wide(x), wide(twiddle)), limit)
  # JAX pulls back by the transpose, without a conjugate.
  matrix = run(np.eye(features), wide(twiddle))
  assert_alike(dx, wide(dy) @ matrix.T, limit)
  if dtype == "complex64":
    return
  # Along a line of twiddles the result is a polynomial, whose slope a tiny
  # imaginary step gives without a difference.
  way = np.random.default_rng(9).normal(size=twiddle.shape)
  slope = run(wide(x), wide(twiddle) + 1e-30j * way).imag / 1e-30
  error = np.sum(wide(dy) * slope) - np.sum(wide(dt) * way)
  assert abs(error) <= limit * np.linalg.norm(wide(dt))


@pytest.mark.parametrize("form", FORMS)
def test_every_entry_of_the_gradient(form):
  _, outputs, _, increasing = CASES["stacks"]
  x, twiddle, dy = draw("stacks")
  _, (_, dt) = program(form)(x, twiddle, dy, outputs, increasing)
  exact = np.zeros(twiddle.shape)
  for at in np.ndindex(*twiddle.shape):
    moved = wide(twiddle).astype(complex)
    moved[at] += 1e-30j
    y = reference("stacks")(wide(x), moved)
    exact[at] = np.sum(wide(dy) * y.imag) / 1e-30
  assert_close(dt, exact, bound("float32", twiddle))


def test_complex_gradients_are_alike_in_all_forms():
  _, outputs, _, increasing = CASES["kaleidoscope"]
  arrays = draw("kaleidoscope", "complex64")
  found = [program(form)(*arrays, outputs, increasing)[1][1] for form in FORMS]
  for other in found[:-1]:
    assert_alike(other, wide(found[-1]), 2 * bound("complex64", arrays[1]))


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_rank_and_vmap(form):
  _, outputs, _, increasing = CASES["stacks"]
  x, twiddle, _ = draw("stacks", rows=2)
  limit = bound("float32", twiddle)

  @jax.jit
  def run(x, twiddle):
    run = functools.partial(
      butterfly_matmul, increasing_stride=increasing, implementation=form
    )
    # Twiddles of their own for each row, which has a single axis; no rows.
    own = jax.vmap(run)(x, jnp.stack([twiddle, 2 * twiddle]))
    return run(x[None], twiddle), own, run(x[:0], twiddle)

  y, own, none = run(x, twiddle)
  assert y.shape == (1, 2, 24)  # out_features is all that three stacks make
  exact = reference("stacks")(wide(x), wide(twiddle))
  assert_close(y[0, :, :outputs], exact, limit)
  stages = twiddle.shape[2]
  assert_close(own, np.stack([y[0, 0], 2**stages * y[0, 1]]), limit)
  assert none.shape == (0, 24)


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_fft(form, increasing):
  n = 128
  x = np.random.default_rng(3).normal(size=(2, n))
  order = bit_reversal(n)
  back = fft_twiddle(n, inverse=True, increasing_stride=increasing)
  run = jax.jit(
    functools.partial(
      butterfly_matmul, increasing_stride=increasing, implementation=form
    )
  )
  for exact, twiddle, numbers in (
    (np.fft.fft(x), fft_twiddle(n, increasing_stride=increasing), x),
    (np.fft.ifft(x), back, x + 0j),
  ):
    numbers = numbers[:, order] if increasing else numbers
    y = run(jnp.asarray(numbers, "complex64"), twiddle)
    assert_alike(
      y if increasing else y[:, order], exact, bound(y.dtype, twiddle)
    )


def test_a_real_input_meets_a_complex_twiddle():
  x = jnp.arange(8.0, dtype=jnp.bfloat16)
  run = lambda x: butterfly_matmul(x[bit_reversal(8)], fft_twiddle(8))
  y = jax.jit(run)(x)
  assert y.dtype == jnp.complex64
  assert_alike(
    y, np.fft.fft(np.arange(8.0)), bound("complex64", fft_twiddle(8))
  )


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_orthogonal_and_identity(dtype):
  shape = twiddle_shape(32, 32, blocks=2)
  twiddle = init_twiddle(
    jax.random.key(0), shape, kind="orthogonal", dtype=dtype
  )
  assert twiddle.dtype == dtype
  signs = np.sign(np.linalg.det(wide(twiddle)).real)
  assert {-1.0, 1.0} <= set(np.unique(signs))  # rotations and reflections
  matrix = butterfly_matmul_reference(np.eye(32), wide(twiddle))
  error = np.abs(matrix @ matrix.conj().T - np.eye(32)).max()
  assert error <= bound(dtype, twiddle)
  same = init_twiddle(jax.random.key(0), shape, kind="identity", dtype=dtype)
  np.testing.assert_array_equal(
    butterfly_matmul_reference(np.eye(32), wide(same)), np.eye(32)
  )


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_randn_keeps_the_variance(dtype):
  twiddle = init_twiddle(
    jax.random.key(1), twiddle_shape(64, 4096), dtype=dtype
  )
  assert twiddle.shape == (64, 1, 6, 32, 2, 2)
  count = twiddle.size
  mean = np.mean(np.abs(wide(twiddle)) ** 2)
  assert abs(mean - 0.5) < 4 * 0.5 * (2 / count) ** 0.5


def test_sizes():
  assert [padded_size(n) for n in (1, 2, 3, 64, 65)] == [2, 2, 4, 64, 128]
  assert twiddle_shape(100, 300, blocks=2) == (3, 2, 7, 64, 2, 2)
  assert [tuning.spans(k) for k in (1, 6, 7, 10, 13)] == [
    ((0, 1),), ((0, 6),), ((0, 4), (4, 7)), ((0, 5), (5, 10)),
    ((0, 5), (5, 9), (9, 13)),
  ]  # fmt: skip


@pytest.mark.parametrize(
  "rows, size, itemsize, platform, form",
  [
    (65536, 256, 2, "gpu", "dense"),
    (65536, 4096, 2, "gpu", "merged"),
    (65536, 1024, 4, "gpu", "merged"),
    (1, 1024, 2, "gpu", "radix2"),
    (16, 1024, 2, "cpu", "radix2"),
    (64, 1024, 4, "cpu", "merged"),
    (2048, 64, 4, "cpu", "dense"),
    (2048, 1024, 4, "cpu", "merged"),
    (1, 1024, 4, "cpu", "radix2"),
    (65536, 4096, 2, "tpu", "merged"),
  ],
)
def test_choice(rows, size, itemsize, platform, form):
  assert tuning.choose(rows, size, size, 1, itemsize, platform) == form


@pytest.mark.parametrize(
  "x, twiddle, options, message",
  [
    (jnp.zeros((2, 3), int), (1, 1, 2, 2, 2, 2), {}, "x is int32, not of a"),
    (jnp.zeros(()), (1, 1, 2, 2, 2, 2), {}, "not (..., C)"),
    (jnp.zeros((2, 5)), (1, 1, 2, 2, 2, 2), {},
     "twiddle is (1, 1, 2, 2, 2, 2), not (S, K, 3, 4, 2, 2) as x (2, 5), "),
    (jnp.zeros((2, 4)), (0, 1, 2, 2, 2, 2), {}, "not (S, K, 2, 2, 2, 2)"),
    (jnp.zeros((2, 4)), (2, 1, 2, 2, 2, 2), {"out_features": 4},
     "out_features is 4, not above 4 and at most 8"),
    (jnp.zeros((2, 4)), (1, 1, 2, 2, 2, 2), {"implementation": "mosaic_gpu"},
     "usable: xla, xla_dense, xla_merged, xla_radix2"),
  ],
)  # fmt: skip
def test_wrong_arguments(x, twiddle, options, message):
  with pytest.raises(ValueError) as caught:
    butterfly_matmul(x, jnp.zeros(twiddle), **options)
  assert message in str(caught.value)


def test_wrong_twiddles():
  with pytest.raises(ValueError, match="kind is 'haar'"):
    init_twiddle(jax.random.key(0), (1, 1, 1, 1, 2, 2), kind="haar")
  with pytest.raises(ValueError, match="n is 12, not a power of two"):
    fft_twiddle(12)
  with pytest.raises(ValueError, match="0 to 4 channels"):
    twiddle_shape(0, 4)
