"""What the Mosaic GPU kernels with transposed products share.

The matrix unit of Hopper takes tiles of 64 rows; where these are columns of the
weights, its sums lie in registers as (columns, rows).
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

# Columns of weights in a tile.
TILE = 64
# The layout of results, (N, columns): every fourth row to a warp, as whole
# lines of memory.
ROWS = plgpu.Layout.TILED(plgpu.Tiling(((4, TILE), (2,))), (-3,), (-2,), -1)
# The layout of wgmma's sums, but that no thread holds two values side by side,
# which would not lie side by side in the transposed memory.
SUMS = plgpu.Layout.TILED(
  plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), (-8,), (-4, -3), -1
)


def load(ref, layout) -> jax.Array:
  """Loads a reference in float32, in a layout."""
  value = plgpu.load(ref, layout=layout, optimized=False)
  return value.astype(jnp.float32)


def store(ref, value):
  """Stores to a reference, be it less than whole lines of memory."""
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:  # jax 0.11, where every store may be of parts of lines
    ref[...] = value


def repeat(vector, axis: int, shape, layout) -> jax.Array:
  """A tile of `shape` and `layout` with the vector along `axis`."""
  value = lax.broadcast_in_dim(vector, shape, (axis,))
  return plgpu.layout_cast(value, layout)


def swizzled(
  shape: tuple[int, ...], dtype: jnp.dtype, bits: int, widest: int = 128
) -> Any:
  """Shared memory as TMA and wgmma take it.

  Args:
    shape: (..., rows, columns).
    dtype: Of the numbers.
    bits: Of one of them, as they lie in memory.
    widest: Bytes of a line that are swizzled together, at most.
  """
  swizzle = min(shape[-1] * bits // 8, widest)
  transforms = (
    plgpu.TilingTransform((8, swizzle * 8 // bits)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def swizzled_levels(
  shape: tuple[int, ...],
  dtype: jnp.dtype,
  bits: int,
  interpret: bool,
  widest: int = 128,
) -> Any:
  """Shared memory of levels; those of 4 bits as bytes of two, and one by one.

  Args:
    shape: (..., rows, columns), counted in levels.
    dtype: Of levels that are not of 4 bits.
    bits: Of a level.
    interpret: Whether the kernel is interpreted, which knows no memory that
      holds numbers of two kinds.
    widest: As of `swizzled`.
  """
  if bits != 4:
    return swizzled(shape, dtype, bits, widest)
  one_by_one = swizzled(shape, jnp.int4, 4, widest)
  if interpret:
    return one_by_one
  # TMA copies bytes, which are then read as pairs of levels.
  pairs = swizzled((*shape[:-1], shape[-1] // 2), jnp.uint8, 8, widest)
  return plgpu.RefUnion(pairs, one_by_one)


def compiler_params() -> plgpu.CompilerParams:
  """Returns what all kernels are compiled with: every layout is given."""
  return plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
  )
