"""Products of every format with every other, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import QTensor, dequantize, quantize, quantized_matmul
from ops.quantized import FORMATS, formats
from ops.quantized_matmul import quantized_matmul_reference, xla
from tests.ops.quantized_test import LATER, NAMES, TWO_LEVELS
from tests.ops.sequence_op import assert_close, tolerance

# More rows than are multiplied at once, and fewer.
ROWS, DEPTH, COLUMNS = (xla.FEW_ROWS + 5, 3), 30, 7
ASYMMETRIC = dataclasses.replace(LATER[0], group=15)
WEIGHTS = [
  *(f"{name}:{group}" for name in NAMES for group in ("tensor", "row", 15)),
  *(f"{name}:15" for name in ("int4_asym", "mxfp4", "nvfp4", "bitmod3")),
  *LATER,
  TWO_LEVELS,
]
# Activations and weights: W8A8, W4A8 and what comes with fp8 and zero points,
# and the dtype that their product takes.
PAIRS = {
  "W8A8": ("int8:row", "int8:row", "int8"),
  "W8A8 per tensor": ("int8:tensor", "int8:tensor", "int8"),
  "W4A8": ("int8:row", "int4:15", "int8"),
  "W4A8 in groups": ("int8:5", "int4:15", "int8"),
  "fp8": ("fp8_e4m3:row", "fp8_e4m3:row", "float8_e4m3fn"),
  "W4 with fp8": ("fp8_e4m3:row", "int4:15", "float8_e4m3fn"),
  "E2M1 with fp8": ("fp8_e4m3:row", TWO_LEVELS, "float8_e4m3fn"),
  "int8 with fp8": ("fp8_e4m3:15", "int8:row", "bfloat16"),
  "NF4 with int8": ("int8:row", LATER[4], "float32"),
  "zero points": (ASYMMETRIC, dataclasses.replace(LATER[1], group=5), "int8"),
  "one zero point": ("int8:row", ASYMMETRIC, "int8"),
  "zero points of x": (ASYMMETRIC, "fp8_e4m3:row", "bfloat16"),
}


@functools.cache
def operands(rows, dtype="float32"):
  rng = np.random.default_rng(rows)
  # Means far from zero: zero points are then worth having.
  x = jnp.asarray(rng.normal(0.5, 1, (rows, DEPTH)), dtype)
  w = rng.normal(0.1, 1, (DEPTH, COLUMNS)) * np.exp(rng.normal(size=COLUMNS))
  return x, jnp.asarray(w, dtype)


pack = jax.jit(quantize, static_argnames=("format", "axis"))
multiply = jax.jit(quantized_matmul, static_argnames="dtype")


def check_weights_only(form, dtype, rows):
  x, w = operands(rows, dtype)
  q = pack(w, form, axis=-2)
  y = multiply(x, q)
  assert y.shape == (rows, COLUMNS) and y.dtype == dtype
  bound = tolerance(dtype, DEPTH)
  assert_close(y, quantized_matmul_reference(x, q), bound)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", WEIGHTS, ids=str)
def test_weights_only(form, rows):
  check_weights_only(form, "float32", rows)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", ["int4:row", "int4:15", "fp8_e4m3:row"])
def test_weights_only_in_bfloat16(form, rows):
  check_weights_only(form, "bfloat16", rows)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("pair", PAIRS)
def test_weights_and_activations(pair, rows):
  x, w = operands(rows)
  form_x, form_w, operand = PAIRS[pair]
  x, w = pack(x, form_x, axis=-1), pack(w, form_w, axis=-2)
  assert xla.product_dtype(x, w) == operand
  y = multiply(x, w)
  assert y.dtype == jnp.float32
  # Codes are exact in the dtype of the product, scales meet float32 sums.
  expected = quantized_matmul_reference(x, w)
  assert_close(y, expected, tolerance("float32", DEPTH))


def test_integers_are_summed_as_integers():
  """A product of 4-bit weights with int8 or fp8 activations is not widened."""
  x, w = operands(3)
  for form_x, form_w, operand, sums in (
    ("int8:row", "int8:row", "i8", "i32"),
    ("int8:row", "int4:15", "i8", "i32"),
    ("fp8_e4m3:row", "int4:15", "f8E4M3FN", "f32"),
  ):
    q = pack(x, form_x, axis=-1), pack(w, form_w, axis=-2)
    text = multiply.lower(*q).as_text()
    (product,) = (line for line in text.splitlines() if "dot_general" in line)
    assert product.count(f"x{operand}>") == 2 and f"x{sums}>" in product


@pytest.mark.parametrize("rows", [1, xla.FEW_ROWS, xla.FEW_ROWS + 1])
def test_any_number_of_rows_and_leading_axes(rows):
  x, w = operands(36)
  for form in ("int8:row", "int4:15"):
    q = pack(w, form, axis=-2)
    y = multiply(x[:rows], q)
    expected = quantized_matmul_reference(x[:rows], q)
    assert_close(y, expected, tolerance("float32", DEPTH))
  whole = multiply(x.reshape(2, 3, 6, DEPTH), q)
  assert_close(whole.reshape(36, COLUMNS), multiply(x, q), 1e-6)
  one = multiply(x[0], q)
  assert one.shape == (COLUMNS,)
  assert_close(one, multiply(x[:1], q)[0], 1e-6)


@pytest.mark.parametrize("form", ["int8:row", "int4:15", TWO_LEVELS], ids=str)
def test_stacked_weights_are_scanned_and_mapped(form):
  x, w = operands(4)
  stack = jnp.stack([w, 2 * w, w - 1])
  q = jax.jit(jax.vmap(lambda w: quantize(w, form, axis=-2)))(stack)
  scanned = jax.jit(
    lambda q: jax.lax.scan(lambda x, w: (x, quantized_matmul(x, w)), x, q)[1]
  )(q)
  mapped = jax.jit(jax.vmap(quantized_matmul, (None, 0)))(x, q)
  for layer in range(3):
    expected = quantized_matmul_reference(x, q[layer])
    assert_close(scanned[layer], expected, tolerance("float32", DEPTH))
    assert_close(mapped[layer], expected, tolerance("float32", DEPTH))


@pytest.mark.parametrize("rows", ROWS)
def test_gradients_flow_to_arrays(rows):
  x, w = operands(rows)
  for form in ("int8:row", "int4:15"):
    q = pack(w, form, axis=-2)
    cotangent = jnp.sin(jnp.arange(rows * COLUMNS).reshape(rows, COLUMNS))
    pull = jax.jit(lambda x, q, dy: jax.vjp(multiply, x, q)[1](dy)[0])
    expected = np.asarray(cotangent, np.float64) @ np.asarray(dequantize(q)).T
    assert_close(pull(x, q, cotangent), expected, tolerance("float32", DEPTH))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_without_a_format(dtype):
  """Arrays are multiplied as `jnp.matmul` does, in the dtype of x."""
  x, _ = operands(3, dtype)
  _, w = operands(3)
  np.testing.assert_array_equal(multiply(x, w), jnp.matmul(x, w.astype(dtype)))
  wide = multiply(x, w, dtype=jnp.float32)
  assert wide.dtype == jnp.float32
  exact = quantized_matmul_reference(x, w.astype(dtype))
  assert_close(wide, exact, tolerance("float32", DEPTH))


def test_result_in_another_dtype_is_not_rounded_before():
  x, w = operands(3, "bfloat16")
  for form in ("int8:row", "int4:15"):
    q = pack(w, form, axis=-2)
    y = multiply(x, q, dtype=jnp.float32)
    assert y.dtype == jnp.float32
    exact = quantized_matmul_reference(x, q)
    assert_close(y, exact, tolerance("float32", DEPTH))


WRONG = {
  "shapes": ((3, 8), (6, 4), None, None, "are not \\(..., D\\) and \\(D, F\\)"),
  "rank": ((3, 8), (2, 8, 4), None, None, "are not"),
  "axis of w": ((3, 8), (8, 8), None, ("int8", -1), "w is quantized along"),
  "axis of x": ((8, 8), (8, 4), ("int8", -2), ("int8", -2), "x is quantized"),
  "array": ((3, 8), (8, 4), ("int8", -1), None, "x is quantized, so w must be"),
  "groups": ((3, 24), (24, 4), ("int8:12", -1), ("int8:8", -2), "2 and 3 gro"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands_get_one_clear_line(case):
  x_shape, w_shape, x_form, w_form, message = WRONG[case]

  def make(shape, form):
    array = jnp.ones(shape)
    return array if form is None else quantize(array, form[0], axis=form[1])

  with pytest.raises(ValueError, match=message) as found:
    jax.eval_shape(
      lambda: quantized_matmul(make(x_shape, x_form), make(w_shape, w_form))
    )
  assert "\n" not in str(found.value)


def test_integers_without_a_format_are_refused():
  with pytest.raises(ValueError, match="w is int8, not of a float dtype"):
    quantized_matmul(jnp.ones((2, 4)), jnp.ones((4, 2), jnp.int8))
  assert isinstance(quantize(jnp.ones((4, 2)), "int8"), QTensor)
  assert formats.get("int8:row") == FORMATS["int8"]
