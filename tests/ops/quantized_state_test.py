"""States of few bits: how they are rounded, and the ops that step them."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import (
  causal_conv1d,
  causal_conv1d_step,
  quantize,
  selective_scan,
  selective_scan_step,
  ssd,
  ssd_step,
)
from ops.quantized import as_array, formats, like, state
from tests.ops.quantized_test import E2M1, NAMES
from tests.ops.sequence_op import assert_close

B, H, P, N = 3, 4, 2, 8
CODEBOOK = formats.Format(
  name="e2m1", bits=4, dtype="uint8", codebook=E2M1, packed=True
)
FORMS = [*(f"{name}:{g}" for name in NAMES for g in ("row", 4)), CODEBOOK]
write = jax.jit(lambda q, x: q.write(x))
read = jax.jit(lambda q: q.read())
# Programs of one op each would take longer to compile.
few = jax.jit(quantize, static_argnums=1)
nearest_to = jax.jit(
  lambda x, form: as_array(quantize(x, form)), static_argnums=1
)
dense_of = jax.jit(as_array)


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def empty(form="int8", shape=(1, B, H, P, N), **options):
  """The state of one layer."""
  q = state.zeros(shape, formats.get(form), jnp.dtype("float32"), **options)
  return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[0]), q)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("seed", [None, 0])
def test_what_is_written_is_on_a_level_beside_it(form, seed):
  x = numbers(B, H, P, N)
  q = write(empty(form, seed=seed), x)
  q.tensor.check()
  assert q.shape == x.shape and q.dtype == jnp.float32
  nearest = nearest_to(x, form)
  if seed is None:
    np.testing.assert_array_equal(read(q), nearest)
    return
  form = formats.get(form)
  size = form.group if isinstance(form.group, int) else N
  steps = np.repeat(np.asarray(q.tensor.scales), size, axis=-1)
  ratios, found, nearest = (
    np.asarray(v, np.float64) / steps for v in (x, read(q), nearest)
  )
  points = form.levels
  high = np.clip(np.searchsorted(points, ratios), 1, len(points) - 1)
  # The largest of a block is its outermost level, but for rounding.
  beside = np.stack([points[high - 1], points[high]])
  assert np.abs(beside - found).min(axis=0).max() < 1e-4 * points.max()
  assert (np.abs(found - nearest) > 0.01).any()


@pytest.mark.parametrize("form", ["int4:row", "fp8_e4m3", CODEBOOK], ids=str)
def test_stochastic_rounding_is_unbiased_and_reproducible(form):
  x = numbers(B, H, P, N)
  count = 2000

  @jax.jit
  def mean(q):
    def one(carry, _):
      q, total = carry
      q = q.write(x)
      return (q, total + q.read()), None

    carry = q, jnp.zeros_like(x)
    return jax.lax.scan(one, carry, length=count)[0][1] / count

  found = mean(empty(form, seed=3))
  np.testing.assert_array_equal(found, mean(empty(form, seed=3)))
  other = mean(empty(form, seed=4))
  assert (found != other).any()
  nearest = nearest_to(x, form)
  # A mean of draws between levels a gap apart is off by gap / 2 / sqrt(count).
  gap = 2.5 * np.abs(nearest - x).max()
  assert np.abs(found - x).max() < 4 * gap / count**0.5


def test_neighbours_and_tokens_draw_apart():
  """Of 4096 numbers 0.37, 0.37 become 1, and others the next time."""
  shape = (1, 1, 4, 8, 128)
  q = empty("int8", shape, seed=0, scales=jnp.ones((1, 1, 1, 1)))
  x = jnp.full(shape[1:], 0.37)
  once = write(q, x)
  draws = [np.asarray(read(v)).ravel() for v in (once, write(once, x))]
  for draw in (*draws, draws[0] * draws[1], draws[0][:-1] * draws[0][1:]):
    share = 0.37 if draw is draws[0] or draw is draws[1] else 0.37**2
    assert abs(draw.mean() - share) < 4 * (share * (1 - share) / 4096) ** 0.5


@pytest.mark.parametrize(
  "options", [{}, {"seed": 1}, {"residual": formats.get("int4")}]
)
def test_rows_are_independent(options):
  x = numbers(B, H, P, N)
  together = write(write(empty(**options), x), 2 * x)
  for row in range(B):
    shape = (1, 1, H, P, N)
    own = x[row : row + 1]
    alone = write(write(empty(shape=shape, **options), own), 2 * own)
    same = jax.tree.map(operator.itemgetter(slice(row, row + 1)), together)
    jax.tree.map(np.testing.assert_array_equal, alone, same)


def test_small_updates_are_lost_but_by_chance_or_by_what_is_left():
  """Nearest rounding stalls; a residual is as good as its bits."""

  def final(q):
    step = lambda q, _: (q.write(q.read() + update), None)
    return jax.lax.scan(step, q.write(start), length=100)[0].read()

  # The block's scale is 1; an update is 1/5 of it.
  start, update = np.zeros((2, 1, 1, 1, N), np.float32)
  start[..., 0], update[..., 1:] = 7.0, 0.2 / 15
  exact = np.asarray(start + 100 * update)
  shape = (1, 1, 1, 1, N)
  make = functools.partial(empty, "int4:row", shape)
  error = {
    name: np.abs(jax.jit(final)(q) - exact)[..., 1:].max()
    for name, q in {
      "nearest": make(),
      "residual": make(residual=formats.get("int8")),
      "wide": empty("int8", shape),
    }.items()
  }
  stochastic = jax.jit(final)(make(seed=0))[..., 1:]
  assert error["nearest"] == pytest.approx(100 * 0.2 / 15)
  assert error["residual"] < 0.2
  assert abs(float(stochastic.mean()) - 100 * 0.2 / 15) < 0.75
  assert error["wide"] == pytest.approx(100 * 0.2 / 15)


def test_a_residual_is_as_good_as_a_wider_format_of_the_same_bytes():
  """15 levels in each of 15 steps are 225, where int8 has 255."""
  x = numbers(B, H, P, N)
  fed = write(empty("int4:row", residual=formats.get("int4")), x)
  wide = write(empty("int8"), x)
  assert fed.residual.nbytes + fed.tensor.values.nbytes == (
    wide.tensor.values.nbytes
  )
  errors = [float(np.abs(read(q) - x).max()) for q in (fed, wide)]
  assert 1 < errors[0] / errors[1] < 1.5


def test_bytes_are_counted():
  blocks = B * H * P
  sizes = {
    "int8": (empty(), blocks * (N + 4)),
    "int4": (empty("int4:4"), blocks * (N // 2 + 2 * 4)),
    "noise": (empty(seed=0), blocks * (N + 4) + 4 * B),
    "residual": (
      empty(residual=formats.get("int4")),
      blocks * (N + N // 2 + 4),
    ),
    "static": (empty(scales=jnp.ones((1, H, P, 1))), blocks * N + 4 * H * P),
  }
  for name, (q, expected) in sizes.items():
    assert q.nbytes == expected, name


def test_static_scales_stay():
  scales = 0.01 + np.abs(numbers(1, H, 1, 1))
  q = empty(scales=scales)
  x = numbers(B, H, P, N)
  new = write(q, x)
  np.testing.assert_array_equal(new.tensor.scales, q.tensor.scales)
  expected = jax.jit(quantize, static_argnums=1)(x, "int8", scales=scales)
  np.testing.assert_array_equal(new.tensor.values, expected.values)


def test_what_does_not_go_together():
  for options in ({"seed": 0}, {"scales": jnp.ones((1, 3, 1, 1))}):
    with pytest.raises(ValueError, match="residual goes with|scales"):
      empty(residual=formats.get("int4"), **options)
  with pytest.raises(ValueError, match="cannot be kept in fp8_e4m3"):
    empty(residual=formats.get("fp8_e4m3"))
  with pytest.raises(ValueError, match="groups of 5 do not divide"):
    empty("int8:5")


OPTIONS = {
  "int8": {},
  "int6": {},
  "int4:4": {},
  "fp8_e4m3": {},
  "int8 stochastic": {"seed": 5},
  "int4:row residual": {"residual": formats.get("int4")},
  "int8 static": {"scales": jnp.full((1, 1, 1, 1), 0.02)},
}


def state_of(case, *shape):
  options = dict(OPTIONS[case])
  if "scales" in options:
    options["scales"] = options["scales"].reshape((1,) * len(shape))
  return empty(case.partition(" ")[0], (1, B, *shape), **options)


def ssd_arrays(tokens):
  return (
    numbers(B, tokens, H, P),
    np.abs(numbers(B, tokens, H, seed=1)),
    -np.abs(numbers(H, seed=2)),
    numbers(B, tokens, 2, N, seed=3),
    numbers(B, tokens, 2, N, seed=4),
  )


def scan_arrays(tokens):
  return (
    numbers(B, tokens, H),
    np.abs(numbers(B, tokens, H, seed=1)),
    -np.abs(numbers(H, N, seed=2)),
    numbers(B, tokens, 2, N, seed=3),
    numbers(B, tokens, 2, N, seed=4),
  )


STEPS = {
  "ssd": (ssd_step, ssd_arrays, (H, P, N)),
  "selective_scan": (selective_scan_step, scan_arrays, (H, N)),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("op", STEPS)
def test_a_step_a_token_is_a_rounding_a_token(op, case):
  step, arrays, shape = STEPS[op]
  step = jax.jit(step, static_argnames="return_all_states")
  x, dt, A, B_, C = arrays(3)
  before = write(state_of(case, *shape), numbers(B, *shape, seed=5))
  ys, whole = step(x, dt, A, B_, C, before)
  _, states = step(x, dt, A, B_, C, before, return_all_states=True)
  kept = before
  for t in range(3):
    token = slice(t, t + 1)
    y, new = step(x[:, token], dt[:, token], A, B_[:, token], C[:, token], kept)
    # The recurrence in floats from the same start, then rounded.
    same, floats = step(
      x[:, token], dt[:, token], A, B_[:, token], C[:, token], read(kept)
    )
    assert_close(y, same, 1e-6)
    assert_close(ys[:, token], y, 1e-6)
    assert_close(read(new), read(write(kept, floats)), 1e-6)
    at = jax.tree.map(operator.itemgetter((slice(None), t)), states)
    jax.tree.map(np.testing.assert_array_equal, at, new)
    kept = new
  jax.tree.map(np.testing.assert_array_equal, whole, kept)


@pytest.mark.parametrize("case", ["int8", "int4:4", "int8 static"])
def test_the_convolution_keeps_its_inputs_in_few_bits(case):
  x, weight = numbers(B, 6, N), numbers(N, 4, seed=1)
  kept = state_of(case, 3, N)
  step = jax.jit(causal_conv1d_step)
  y, whole = step(x[:, :4], weight, None, kept)
  start = kept
  for t in range(4):
    _, start = step(x[:, t : t + 1], weight, None, start)
  # Rounding again what is on levels changes it by a rounding of its scale.
  assert_close(read(start), read(whole), 1e-6)
  after, _ = step(x[:, 4:5], weight, None, whole)
  expected = jax.jit(causal_conv1d)(
    x[:, 4:5], weight, initial_state=read(write(kept, x[:, 1:4]))
  )
  assert_close(after, expected, 1e-6)


def test_ops_take_what_is_quantized():
  """They give what the levels give."""
  whole = lambda *arrays: tuple(map(dense_of, arrays))
  for op, arrays, shape in (
    (ssd, ssd_arrays(5), (H, P, N)),
    (selective_scan, scan_arrays(5), (H, N)),
  ):
    x, dt, A, B_, C = arrays
    q = few(x, "int8:1"), few(dt, "int8"), few(B_, "int4:4"), few(C, "fp8_e4m3")
    z = few(np.flip(x), "int8")
    start = write(state_of("int8", *shape), numbers(B, *shape, seed=5))
    run = jax.jit(functools.partial(op, return_final_state=True))
    found = run(*q[:2], A, *q[2:], z=z, initial_state=start)
    dense = whole(*q)
    expected = run(
      *dense[:2], A, *dense[2:], z=dense_of(z), initial_state=read(start)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    step = jax.jit({ssd: ssd_step, selective_scan: selective_scan_step}[op])
    found = step(*q[:2], A, *q[2:], read(start), z=z)
    expected = step(*dense[:2], A, *dense[2:], read(start), z=dense_of(z))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  x, weight = few(numbers(B, 5, N), "int8"), few(numbers(N, 4), "int8")
  start = numbers(B, 3, N)
  for op in (causal_conv1d, lambda *a: causal_conv1d_step(*a, None, start)):
    op = jax.jit(op)
    np.testing.assert_array_equal(
      jax.tree.leaves(op(x, weight))[0],
      jax.tree.leaves(op(*whole(x, weight)))[0],
    )


def test_an_array_is_kept_in_its_dtype():
  x = numbers(2, 3)
  assert like(x, None) is x
  assert like(x, x.astype("bfloat16")).dtype == jnp.bfloat16
  q = dataclasses.replace(empty(), static=False)
  assert like(numbers(B, H, P, N), q).shape == q.shape
