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
    if math.prod(x.shape[:-1]) > FEW_ROWS and w.num_blocks > 1:
      w = dequantize(w, dtype=x.dtype)
  if not isinstance(w, QTensor):
    preferred = None if dtype == x.dtype else dtype
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=preferred)
  count = w.num_blocks
  if isinstance(x, QTensor):
    count = max(count, x.num_blocks)
    operand = product_dtype(x, w)
  else:
    operand = x.dtype
  rows = math.prod(x.shape[:-1])
  # (N, M, K) and (N, F, K), scales and zero points (N, M, 1) and (N, F, 1).
  left, right = (_groups(a, count, operand) for a in (x, w))
  if count == 1 or rows <= FEW_ROWS:
    y = jnp.sum(jax.vmap(_product)(left, right), axis=0)
  else:
    add = lambda total, group: (total + _product(*group), None)
    y = jnp.zeros((rows, w.shape[1]), jnp.float32)
    y, _ = jax.lax.scan(add, y, (left, right))
  return y.astype(dtype).reshape(*x.shape[:-1], w.shape[1])


def _groups(a, count, operand):
  """Levels, scales and zero points of `count` groups, N in front.

  Where there are fewer scales than groups, each serves neighbours.
  """

  def flat(v):
    return v.reshape(-1, v.shape[-1]).swapaxes(0, 1)

  def blocks(v):
    v = v.reshape(-1, v.shape[-1]).astype(operand)
    return into_blocks(v, -1, count).swapaxes(0, 1)

  if not isinstance(a, QTensor):
    return blocks(a), None, None

  def shared(v):
    if v is None:
      return None
    # An axis that shares a scale is spread here, so that rows can be counted.
    v = jnp.broadcast_to(v, (*a.values.shape[:-1], v.shape[-1]))
    return flat(jnp.repeat(v, count // v.shape[-1], axis=-1))[..., None]

  return blocks(levels(a)), shared(as_array(a.scales)), shared(a.zeros)


def _product(left, right):
  """The product of one group in float32: (M, K) by (F, K)."""
  (x, x_scales, x_zeros), (w, w_scales, w_zeros) = left, right
  whole = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
  total = jnp.matmul(x, w.T, preferred_element_type=whole)
  wide = lambda v: v.astype(whole)
  sums = lambda v: jnp.sum(wide(v), axis=1, keepdims=True)
  if w_zeros is not None:
    beside = sums(x)
    if x_zeros is not None:
      beside = beside - x.shape[1] * wide(x_zeros)
    total = total - _outer(beside, wide(w_zeros))
  if x_zeros is not None:
    total = total - _outer(wide(x_zeros), sums(w))
  total = total.astype(jnp.float32)
  for scales in (x_scales, None if w_scales is None else w_scales.T):
    if scales is not None:
      total = total * jnp.broadcast_to(scales.astype(jnp.float32), total.shape)
  return total


def _outer(rows, columns):
  """(M, 1) and (F, 1): (M, F)."""
  shape = rows.shape[0], columns.shape[0]
  return jnp.broadcast_to(rows, shape) * jnp.broadcast_to(columns.T, shape)


def product_dtype(x: QTensor, w: QTensor) -> jnp.dtype:
  """Returns the narrowest dtype that holds the levels of both."""
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
