"""Every row of the table of formats, and rows that it does not have yet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dequantize, quantize
from ops.quantized import (
  FORMATS,
  Format,
  Percentile,
  QTensor,
  absmax,
  formats,
  quantize_reference,
)

# The group is odd, so that its packed codes straddle bytes.
GROUP, SIZE = 5, 45
# Rows of codebooks and scales of few bits are tested in quantized_formats_test.
NAMES = "int8", "int6", "int4", "fp8_e4m3"
ROWS = [f"{name}:{g}" for name in NAMES for g in ("tensor", "row", GROUP)]
NORMAL_FLOAT = (
  -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
  0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0,
)  # fmt: skip
E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0,
        4.0, 6.0)  # fmt: skip
# Formats to come are rows: no code knows of these.
LATER = [
  Format(name="int8_asymmetric", bits=8, dtype="int8", symmetric=False),
  Format(
    name="int4_asymmetric", bits=4, dtype="int8", symmetric=False,
    group=GROUP, packed=True,
  ),
  Format(name="int3", bits=3, dtype="int8", scale_dtype="float16"),
  Format(name="int2", bits=2, dtype="int8", group=GROUP, packed=True),
  Format(
    name="nf4", bits=4, dtype="uint8", codebook=NORMAL_FLOAT,
    group=GROUP, scale_dtype="bfloat16", packed=True,
  ),
  Format(name="fp8_e5m2", bits=8, dtype="float8_e5m2"),
]  # fmt: skip
TWO_LEVELS = Format(
  name="nvfp4", bits=4, dtype="uint8", codebook=E2M1, group=GROUP,
  scale_format="fp8_e4m3:tensor", packed=True,
)  # fmt: skip


@functools.cache
def numbers(size, dtype="float32"):
  """(7, 4, size): cases of all kinds."""
  rng = np.random.default_rng(0)
  shape = (4, size)
  cases = [
    rng.normal(size=shape),
    rng.standard_t(2, shape) * 1e3,
    rng.uniform(-1, 1, shape) * 1e-6,
    np.zeros(shape),
    np.full(shape, -0.37),
    np.abs(rng.normal(size=shape)) + 5,
    np.where(rng.random(shape) < 0.9, 0, rng.normal(size=shape)),
  ]
  return jnp.asarray(np.stack(cases), dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def there_and_back(x, form, axis):
  """Of stacked arrays (N, ...): the QTensors and what comes back."""
  q = jax.vmap(lambda x: quantize(x, form, axis=axis))(x)
  return q, jax.vmap(dequantize)(q)


quantize_jit = jax.jit(quantize, static_argnames=("format", "axis", "observer"))
dequantize_jit = jax.jit(dequantize)


def half_gaps(form, ratios):
  """Half of the distance between the levels around each ratio."""
  points = form.levels
  at = np.clip(np.searchsorted(points, ratios), 1, points.size - 1)
  return (points[at] - points[at - 1]) / 2


@pytest.mark.parametrize("form", [*ROWS, *LATER], ids=str)
def test_values_come_back_as_their_nearest_levels(form):
  form = formats.get(form)
  x = numbers(SIZE)
  q, back = there_and_back(x, form, -1)
  assert q.dtype == back.dtype == jnp.float32
  assert q.shape == x.shape and q.ndim == 3 and q.size == x.size
  q.check()
  for case, (values, found) in enumerate(zip(np.asarray(x), np.asarray(back))):
    expected, scales = quantize_reference(values, form)
    # Of one value roundings of its ratio may decide between two levels: then
    # both are equally near.
    slack = 2**-20 * np.abs(values).max()
    error, least = np.abs(found - values), np.abs(expected - values)
    assert np.all(error <= least + slack), case
    bound = scales * (
      half_gaps(form, values / np.where(scales > 0, scales, 1))
      if form.symmetric
      else 1
    )
    # Scales of fewer bits may be rounded down: the outermost values clip.
    few = 0 if form.scale_dtype == "float32" else 2**-8
    assert np.all(error <= bound + slack + few * np.abs(values).max()), case
  np.testing.assert_array_equal(back[3], 0)


@pytest.mark.parametrize("size", [1, 2, 33])
@pytest.mark.parametrize("name", NAMES)
def test_any_length_and_axis_come_back(name, size):
  """Codes fill no whole bytes, and lie along the axis that is asked for."""
  x = jnp.swapaxes(numbers(size), 1, 2)
  q, back = there_and_back(x, formats.get(f"{name}:row"), -2)
  assert q.shape == x.shape and q.scales.shape == (len(x), 4, 1)
  # Products read along the codes.
  assert q.values.shape[:2] == (len(x), 4)
  for values, found in zip(np.asarray(x), np.asarray(back)):
    expected, scales = quantize_reference(values, f"{name}:row", axis=-2)
    error, least = np.abs(found - values), np.abs(expected - values)
    assert np.all(error <= least + 2**-20 * np.abs(values).max())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_quantized_as_its_float32_values(name):
  form = formats.get(f"{name}:{GROUP}")
  x = numbers(SIZE, "bfloat16")
  q, back = there_and_back(x, form, -1)
  wide, expected = there_and_back(x.astype(jnp.float32), form, -1)
  assert q.dtype == back.dtype == jnp.bfloat16
  jax.tree.map(
    np.testing.assert_array_equal, jax.tree.leaves(q), jax.tree.leaves(wide)
  )
  np.testing.assert_array_equal(back, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("form", [*ROWS, LATER[0], LATER[4]], ids=str)
def test_what_came_back_once_comes_back_the_same(form):
  """Levels are fixed points: nothing drifts from saving to saving."""
  form = formats.get(form)
  _, once = there_and_back(numbers(SIZE), form, -1)
  _, twice = there_and_back(once, form, -1)
  slack = 2**-21 * np.abs(once).max(axis=(1, 2), keepdims=True)
  if form.symmetric:
    assert np.all(np.abs(once - twice) <= slack)
  else:  # a range may have shrunk, with its zero point elsewhere
    _, scales = quantize_reference(np.asarray(once[0]), form)
    assert np.all(np.abs(once - twice)[0] <= scales)


def test_scales_have_a_second_level():
  x = numbers(SIZE)
  q, back = there_and_back(x, TWO_LEVELS, -1)
  assert isinstance(q.scales, QTensor)
  q.check()
  assert q.scales.values.dtype == jnp.float8_e4m3fn
  assert q.scales.shape == (7, 4, SIZE // GROUP)
  assert q.scales.scales.shape == (7, 1, 1)
  largest = np.abs(np.asarray(x).reshape(7, 4, -1, GROUP)).max(-1)
  # A scale is off by 2^-4 and levels lie up to a third of the largest apart;
  # the smallest scales fall below the range of e4m3.
  off = (1 / 6 + 2**-4) * largest + 2**-10 / 448 * largest.max()
  error = np.abs(np.asarray(x - back)).reshape(7, 4, -1, GROUP).max(-1)
  assert np.all(
    error <= off + 6 * 2**-17 * largest.max(axis=(1, 2))[:, None, None]
  )


def test_bytes_are_counted():
  """Values of few bits take few bytes, and so do their scales."""
  x = numbers(SIZE)[0]
  sizes = {
    "int8:row": 4 * 45 + 4 * 4,
    "int8:tensor": 4 * 45 + 4,
    "int6:row": 4 * 3 * 12 + 4 * 4,
    "int4:5": 4 * 23 + 4 * 4 * 9,
    "fp8_e4m3:row": 4 * 45 + 4 * 4,
    TWO_LEVELS: 4 * 23 + 4 * 9 + 4,
  }
  for form, expected in sizes.items():
    q = jax.eval_shape(functools.partial(quantize, format=form), x)
    assert q.nbytes == expected, form


@pytest.mark.parametrize("axis", [-1, -2])
def test_percentile_clips_what_is_beyond(axis):
  x = np.asarray(numbers(SIZE)[1]).swapaxes(-1, axis)
  for form in ("int8:row", "int8:tensor"):
    q = quantize_jit(x, form, axis=axis, observer=Percentile(90.0))
    over = None if form == "int8:tensor" else axis
    largest = np.percentile(np.abs(x), 90.0, axis=over, keepdims=True)
    np.testing.assert_allclose(
      np.moveaxis(q.scales, -1, axis), largest / 127, rtol=1e-5
    )
    np.testing.assert_allclose(
      dequantize_jit(q), np.clip(x, -largest, largest), atol=largest.max() / 253
    )
  whole = quantize_jit(x, "int8:row", axis=axis, observer=Percentile(100.0))
  same = quantize_jit(x, "int8:row", axis=axis, observer=absmax)
  np.testing.assert_array_equal(whole.scales, same.scales)


def test_given_scales_are_taken():
  x = numbers(SIZE)[0]
  own = quantize_jit(x, f"int8:{GROUP}")
  for scales in (own.scales, jnp.full((1, 1), 0.02), jnp.full((4, 1), 0.02)):
    q = quantize_jit(x, f"int8:{GROUP}", scales=scales)
    assert q.scales.shape[-1] == SIZE // GROUP
    expected = np.clip(np.round(x / np.repeat(q.scales, GROUP, -1)), -127, 127)
    np.testing.assert_array_equal(q.values, expected)
  with pytest.raises(ValueError, match="must be for a symmetric format"):
    quantize(x, f"int8:{GROUP}", scales=jnp.ones((4,)))
  with pytest.raises(ValueError, match="must be for a symmetric format"):
    quantize(x, LATER[0], scales=jnp.ones((4, 1)))


@pytest.mark.parametrize("form", [*ROWS, LATER[0], LATER[4]], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(form, bad):
  x = numbers(SIZE).at[0, 1, 2].set(bad)
  _, back = there_and_back(x, formats.get(form), -1)
  assert not np.isfinite(back[0, 1, 2])
  assert np.all(np.isfinite(back[1:]))


def test_stacked_layers_are_mapped_scanned_and_indexed():
  x = numbers(SIZE)
  tokens = jnp.asarray([[0, 6], [3, 3]])

  @jax.jit
  def views(q, layer):
    one = lambda n, q: (n, dequantize(q))
    scanned = jax.lax.scan(one, 0, q)[1]
    parts = q[layer, 1:3], q[tokens], q[...]
    return scanned, *(dequantize(part) for part in parts)

  for form in (formats.get("int4:5"), TWO_LEVELS, LATER[1]):
    q, back = there_and_back(x, form, -1)
    found = views(q, 4)
    expected = back, back[4, 1:3], back[tokens], back
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("form", ["int8:tensor", "int4:5", TWO_LEVELS], ids=str)
def test_columns_of_a_kernel_and_its_transpose(form):
  x = jnp.swapaxes(numbers(SIZE), 1, 2)
  q, back = there_and_back(x, formats.get(form), -2)

  @jax.jit
  def views(q):
    parts = q[..., 1:3], q[2, ..., :1], q.T, q.T.T
    return tuple(dequantize(part) for part in parts)

  expected = back[..., 1:3], back[2, ..., :1], back.swapaxes(1, 2), back
  jax.tree.map(np.testing.assert_array_equal, views(q), expected)
  for index in ((0, slice(0, 5)), (..., 1), (0, 0, 0), (0, 0, 0, 0)):
    with pytest.raises(IndexError, match="QTensor"):
      q[index]


WRONG = {
  "int5": "no number format 'int5'; there are int8, int6, int4, fp8_e4m3",
  "int4:": "'' is no granularity; it is tensor, row or the size of a group",
  "int4:0": "'0' is no granularity",
  "int4:-8": "'-8' is no granularity",
  "int4:column": "'column' is no granularity",
  "int4:32": "groups of 32 do not divide an axis of 45",
}


@pytest.mark.parametrize("form", WRONG)
def test_wrong_formats_get_one_clear_line(form):
  with pytest.raises(ValueError, match=WRONG[form]) as found:
    quantize(numbers(SIZE), form)
  assert "\n" not in str(found.value)


def test_other_arrays_are_refused():
  with pytest.raises(ValueError, match="x is int32"):
    quantize(jnp.ones((2, 4), jnp.int32), "int8")
  with pytest.raises(ValueError, match="has no axis 2"):
    quantize(jnp.ones((2, 4)), "int8", axis=2)
  with pytest.raises(ValueError, match="not in \\(0, 100\\]"):
    Percentile(0)
  with pytest.raises(ValueError, match="no implementation 'mosaic_gpu'"):
    quantize(jnp.ones((2, 4)), "int8", implementation="mosaic_gpu")


def test_names_of_formats_are_their_rows():
  for name, form in FORMATS.items():
    assert form.name == name and formats.get(str(form)) == form
    assert formats.get(f"{name}:tensor").group == "tensor"
    assert form.levels.size <= 2**form.bits
