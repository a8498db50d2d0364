"""`quantized_matmul`: checks and choice of the implementation."""

import importlib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.hadamard_transform import hadamard_transform
from ops.quantized import QTensor, QWeight, as_array

# The kernel runs where it is named: its times are not published yet.
IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "xla": dispatch.always,
    "mosaic_gpu": dispatch.on_one_device(
      dispatch.kernel("ops.quantized_matmul.mosaic_gpu", dispatch.needs_wgmma)
    ),
  }
)


def quantized_matmul(
  x: jax.Array | QTensor,
  w: jax.Array | QTensor | QWeight,
  *,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies activations by weights, each an array or of few bits.

    y_mf = sum_G s_mG s_Gf sum_{d in G} (c_md - z_mG) (c_df - z_Gf)

  with the codes c (through their levels), scales s and zero points z of
  `QTensor` over blocks G of the axis D, that of an array being c = x, s = 1.
  The equivalent plain JAX is

    jnp.matmul(dequantize(x), dequantize(w))

  Args:
    x: (..., D): bfloat16 or float32, or a QTensor with axis -1.
    w: (D, F): an array, which is cast to x's dtype, or a QTensor with axis -2.
      Stacked weights are scanned or vmapped over. A `QWeight` rotates and
      quantizes x, an array, first.
    dtype: Of y; by default x's.
    implementation: `"mosaic_gpu"` (Hopper; 4-bit or 8-bit integers in groups of
      a multiple of 64, with up to 64 rows of x multiplied in bfloat16; beyond
      that also float8, and groups of a multiple of 128 for an x of 8 bits),
      `"xla"`, or None for the latter.

  Returns:
    (..., F). Two QTensors are multiplied in the narrowest of int8 (with int32
    sums), float8_e4m3fn, bfloat16 and float32 that holds the levels of both: so
    W8A8 and W4A8 run in int8, fp8 with int4 in fp8. An array x multiplies
    levels in its own dtype. Sums are float32 or int32, and scales multiply
    sums, so that they are never rounded to fewer bits. But for groups with more
    than 32 rows of an array x, where w is dequantized to x's dtype first.
    Gradients flow to arrays, not to QTensors. Memory beyond the arguments is of
    the order of D F in the dtype of the product.

  Raises:
    ValueError: Shapes, axes or groups do not fit.
  """
  dtype = jnp.dtype(dtype or x.dtype)
  if isinstance(w, QWeight):
    x, w = _prepare(x, w)
  _check(x, w)
  name = dispatch.resolve(
    "quantized_matmul", IMPLEMENTATIONS, implementation, x, w
  )
  implementing = importlib.import_module(f"ops.quantized_matmul.{name}")
  return implementing.forward(x, w, dtype=dtype)


def _prepare(x, w):
  """The operands of a product with a QWeight, x rotated and quantized."""
  if isinstance(x, QTensor):
    raise ValueError(
      "quantized_matmul: x is quantized already, and w is a QWeight, which"
      " would do it; give its `weight`"
    )
  if w.hadamard:
    x = hadamard_transform(x)
  if w.input is not None:
    x = w.input(x)
    # A weight that is an array takes what the levels stand for.
    x = x if isinstance(w.weight, QTensor) else as_array(x)
  return x, w.weight


def _check(x, w):
  op = "quantized_matmul"
  if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
    raise ValueError(
      f"{op}: x {x.shape} and w {w.shape} are not (..., D) and (D, F)"
    )
  for name, a, axis in (("x", x, -1), ("w", w, -2)):
    if isinstance(a, QTensor):
      if a.axis != axis:
        raise ValueError(
          f"{op}: {name} is quantized along axis {a.axis}, not {axis}"
        )
    elif not jnp.issubdtype(a.dtype, jnp.floating):
      raise ValueError(f"{op}: {name} is {a.dtype}, not of a float dtype")
  if isinstance(x, QTensor):
    if not isinstance(w, QTensor):
      raise ValueError(f"{op}: x is quantized, so w must be")
    few, many = sorted((x.num_blocks, w.num_blocks))
    if many % few:
      raise ValueError(f"{op}: {few} and {many} groups do not fit each other")
