"""What the Mosaic GPU kernels with transposed products share.

The matrix unit of Hopper takes tiles of 64 rows; where these are columns of the
weights, its sums lie in registers as (columns, rows).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

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


def compiler_params() -> plgpu.CompilerParams:
  """Returns what all kernels are compiled with: every layout is given."""
  return plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
  )
