"""Quantizers of activations, and weights that bring one with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dequantize, hadamard_transform, quantize, quantized_matmul
from ops.quantized import Quantizer, QWeight, as_array, formats
from tests.ops.sequence_op import assert_close, tolerance

ROWS, DEPTH, COLUMNS = 6, 24, 8
multiply = jax.jit(quantized_matmul, static_argnames="dtype")


def numbers(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


@pytest.mark.parametrize(
  "form, shape",
  [
    ("int8", (1,)),
    ("int8:tensor", (1,)),
    ("int8:8", (3,)),
    ("int8:8", (1,)),
    ("int8:1", (24,)),
    ("fp8_e4m3", (4, 1)),
    ("int4:12", (4, 2)),
    ("int4:12", (5, 1, 1)),
  ],
)
def test_static_scales_serve_blocks_of_any_input(form, shape):
  x = numbers(5, 4, DEPTH)
  scales = 0.02 + 0.01 * jnp.abs(numbers(*shape, seed=1))
  q = jax.jit(lambda q, x: q(x))(
    Quantizer(scales=scales, format=formats.get(form)), x
  )
  q.check()
  assert q.axis == -1 and q.shape == x.shape
  count = q.scales.shape[-1]
  step = np.broadcast_to(scales, (5, 4, count))
  step = np.repeat(step, DEPTH // count, axis=-1)
  top = np.abs(formats.get(form).levels).max()
  inside = np.abs(x) < step * top
  error = np.abs(as_array(q) - x)
  # A float's levels are 2^-4 of their value apart, or less.
  bound = step / 2 if form.startswith("int") else np.abs(x) / 16 + step
  assert inside.any() and np.all((error <= 1.01 * bound)[inside])
  np.testing.assert_allclose(
    np.abs(as_array(q))[~inside], (step * top)[~inside], rtol=1e-6
  )


def test_dynamic_scales_are_those_of_quantize():
  x = numbers(3, DEPTH)
  q = Quantizer(scales=None, format=formats.get("int8:8"))(x)
  np.testing.assert_array_equal(q.values, quantize(x, "int8:8").values)


def test_scales_that_do_not_fit():
  form = formats.get("int8:8")
  with pytest.raises(ValueError, match="more axes"):
    Quantizer(scales=jnp.ones((2, 3, 3)), format=form)(numbers(2, DEPTH))
  with pytest.raises(ValueError, match=r"scales \(1, 5\)"):
    Quantizer(scales=jnp.ones(5), format=form)(numbers(2, DEPTH))


INPUTS = {
  "none": None,
  "dynamic": Quantizer(scales=None, format=formats.get("int8")),
  "static": Quantizer(
    scales=np.full((2, 1), 0.03, np.float32), format=formats.get("int8")
  ),
}
WEIGHTS = {
  "array": lambda w: w,
  "int8": lambda w: jax.vmap(lambda w: quantize(w, "int8", axis=-2))(w),
}


@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("hadamard", [False, True])
def test_the_input_is_rotated_rounded_and_multiplied(weight, input, hadamard):
  x, w = numbers(ROWS, DEPTH), numbers(2, DEPTH, COLUMNS, seed=1)
  kept = hadamard_transform(w, axis=-2) if hadamard else w
  q = QWeight(
    weight=WEIGHTS[weight](kept), input=INPUTS[input], hadamard=hadamard
  )
  assert q.shape == w.shape and q.ndim == 3 and q.size == w.size
  # Scanned over layers as weights are, and each layer by itself.
  _, ys = jax.lax.scan(lambda c, w: (c, multiply(x, w)), None, q)
  bound = tolerance("float32", DEPTH)
  for layer, y in enumerate(ys):
    own = hadamard_transform(x) if hadamard else x
    if INPUTS[input] is not None:
      scales = INPUTS[input].scales
      scales = None if scales is None else scales[layer][None]
      own = dequantize(quantize(own, "int8", scales=scales))
    expected = np.asarray(own, np.float64) @ as_array(q.weight)[layer]
    assert_close(y, expected, bound)
    assert_close(multiply(x, q[layer]), expected, bound)
    columns = multiply(x, q[layer][:, 2:5])
    assert_close(columns, expected[:, 2:5], bound)
  # What it stands for is the weight before the rotation.
  bound = bound if weight == "array" else 0.05
  assert_close(as_array(q), np.asarray(w, np.float64), bound)
  flipped = q.T
  assert flipped.shape == (2, COLUMNS, DEPTH)
  np.testing.assert_array_equal(as_array(flipped.T.weight), as_array(q.weight))


def test_gradients_flow_past_a_rotation_but_no_rounding():
  x, w = numbers(ROWS, DEPTH), numbers(DEPTH, COLUMNS, seed=1)
  q = QWeight(weight=hadamard_transform(w, axis=-2), input=None, hadamard=True)
  dx = jax.grad(lambda x: quantized_matmul(x, q).sum())(x)
  assert_close(dx, np.broadcast_to(np.sum(w, 1), x.shape), 1e-5)


def test_an_input_is_not_quantized_twice():
  w = QWeight(weight=numbers(DEPTH, COLUMNS), input=None)
  with pytest.raises(ValueError, match="x is quantized already"):
    quantized_matmul(quantize(numbers(ROWS, DEPTH), "int8"), w)
