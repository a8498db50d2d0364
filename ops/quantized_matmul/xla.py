"""`quantized_matmul` in plain JAX: products of levels, scaled group by group.

Letters: M rows, D the summed axis, F columns, N groups of D, K values of a
group.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ops.quantized import QTensor, as_array, dequantize
from ops.quantized.quantize import into_blocks, levels

# Up to so many rows all groups are multiplied at once: their sums, (N, M, F),
# are then no more than the weights.
FEW_ROWS = 32
# Operands of a product of two QTensors, the fastest first.
_OPERANDS = ("int8", "float8_e4m3fn", "bfloat16", "float32")


def forward(
  x: jax.Array | QTensor, w: jax.Array | QTensor, *, dtype: jnp.dtype
) -> jax.Array:
  """Implements `quantized_matmul`; arguments as in `ops.quantized_matmul`."""
  if isinstance(w, QTensor) and not isinstance(x, QTensor):
    if math.prod(x.shape[:-1]) > FEW_ROWS and w.scales.shape[0] > 1:
      w = dequantize(w, dtype=x.dtype)
  if not isinstance(w, QTensor):
    preferred = None if dtype == x.dtype else dtype
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=preferred)
  count = w.scales.shape[0]
  if isinstance(x, QTensor):
    count = max(count, x.scales.shape[-1])
    operand = _operand(x, w)
  else:
    operand = x.dtype
  rows = math.prod(x.shape[:-1])
  # (N, M, K) and (N, K, F), scales and zero points (N, M, 1) and (N, 1, F).
  left = _groups(x, -1, count, operand, lambda v: v.reshape(rows, v.shape[-1]))
  right = _groups(w, -2, count, operand, lambda v: v)
  left = jax.tree.map(lambda v: v.swapaxes(0, 1), left)
  if count == 1 or rows <= FEW_ROWS:
    y = jnp.sum(jax.vmap(_product)(left, right), axis=0)
  else:
    add = lambda total, group: (total + _product(*group), None)
    y = jnp.zeros((rows, w.shape[1]), jnp.float32)
    y, _ = jax.lax.scan(add, y, (left, right))
  return y.astype(dtype).reshape(*x.shape[:-1], w.shape[1])


def _groups(a, axis, count, operand, flat):
  """Levels, scales and zero points of `count` groups, N in front of K.

  Where there are fewer scales than groups, each serves neighbours.
  """
  if not isinstance(a, QTensor):
    return into_blocks(flat(a), axis, count), None, None

  def shared(v):
    if v is None:
      return None
    v = jnp.repeat(v, count // v.shape[axis], axis=axis)
    # An axis that shares a scale is spread here, so that rows can be counted.
    shape = [*a.shape[:-1], count] if axis == -1 else [count, v.shape[-1]]
    return jnp.expand_dims(flat(jnp.broadcast_to(v, shape)), axis)

  blocks = into_blocks(flat(levels(a)).astype(operand), axis, count)
  return blocks, shared(as_array(a.scales)), shared(a.zeros)


def _product(left, right):
  """The product of one group in float32: (M, K) by (K, F)."""
  (x, x_scales, x_zeros), (w, w_scales, w_zeros) = left, right
  whole = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
  total = jnp.matmul(x, w, preferred_element_type=whole)
  wide = lambda v: v.astype(whole)
  if w_zeros is not None:
    sums = jnp.sum(wide(x), axis=1, keepdims=True)
    if x_zeros is not None:
      sums = sums - x.shape[1] * wide(x_zeros)
    total = total - _outer(sums, wide(w_zeros))
  if x_zeros is not None:
    sums = jnp.sum(wide(w), axis=0, keepdims=True)
    total = total - _outer(wide(x_zeros), sums)
  total = total.astype(jnp.float32)
  for scales in (x_scales, w_scales):
    if scales is not None:
      total = total * jnp.broadcast_to(scales.astype(jnp.float32), total.shape)
  return total


def _outer(rows, columns):
  """(M, 1) times (1, F or 1)."""
  shape = rows.shape[0], columns.shape[1]
  return jnp.broadcast_to(rows, shape) * jnp.broadcast_to(columns, shape)


def _operand(x: QTensor, w: QTensor) -> jnp.dtype:
  """The narrowest dtype that holds the levels of both."""
  points = (x.format.levels, w.format.levels)
  for name in _OPERANDS[:-1]:
    if all(_exact(tuple(one), name) for one in points):
      return jnp.dtype(name)
  return jnp.dtype(_OPERANDS[-1])


@functools.cache
def _exact(points: tuple[float, ...], dtype: str) -> bool:
  if dtype == "int8":
    return all(p == round(p) and -128 <= p <= 127 for p in points)
  points = np.asarray(points)
  return bool(np.all(points.astype(jnp.dtype(dtype)).astype(float) == points))
