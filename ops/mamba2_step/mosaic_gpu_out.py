"""The third kernel of a layer: `out_proj`, and the norm of the next layer.

Blocks of a cluster may share K, as `mosaic_gpu_stream` has it.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.mamba2_step import mosaic_gpu_product as product
from ops.mamba2_step import mosaic_gpu_stream as stream

NAME = "mamba2_step_out"


def project(
  matmul,
  layer,
  gated,
  squares,
  weights,
  residual,
  groups,
  *,
  eps,
  config,
  interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Adds the layer's output to the residual stream.

  The factor of the gated norm is that of a row and group, so it follows the
  product over the channels of the group.

  Args:
    matmul: The product, see `mosaic_gpu.prepare`.
    layer: (1,) int32.
    gated: Of `mosaic_gpu_state.advance`, as `squares`.
    squares: See there.
    weights: Of all layers, as `mosaic_gpu.layer` makes them.
    residual: (N, D) float32.
    groups: Of the gated norm.
    eps: Of the gated norm.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    The residual stream, and what the next layer takes of it: see
    `mosaic_gpu.Residual`.
  """
  rows, depth = gated.shape
  num_layers, width = weights.norm.shape
  heads = weights.D.shape[1] // groups
  shape = matmul.finished
  columns, splits = shape[1], matmul.splits
  blocks, tiles = -(-width // matmul.columns), width // columns
  if width % columns or (splits > 1 and groups > 1):
    raise ValueError(
      f"mamba2_step: {columns} out_columns must divide the width {width}, and"
      f" {splits} out_splits need a norm of one group, not {groups}"
    )

  def kernel(
    layer_ref, gated_ref, squares_ref, norm_ref, residual_ref, next_ref, *refs,
    **s,
  ):  # fmt: skip
    *w_refs, new_ref, scaled_ref, new_squares_ref = refs
    layer = layer_ref[0]
    block = lax.axis_index("columns")
    split = lax.axis_index("split") if splits > 1 else 0
    following = jnp.minimum(layer + 1, num_layers - 1)

    me = lax.axis_index("warpgroup") if matmul.workers > 1 else 0
    # Of those that one warpgroup finishes. The last block may have some behind
    # the last column.
    each = matmul.columns // columns
    place = block * each + (me if each > 1 else 0)
    tile = jnp.minimum(place, tiles - 1) if tiles % each else place
    own = pl.ds(tile * columns, columns)
    some_rows = matmul.own_rows(me, split)

    def prepare(me):
      factors = []
      for k in range(groups):
        # Those of the parts of a product are of all its rows.
        parts = squares_ref if groups > 1 else squares_ref.at[some_rows]
        total = product.sum_of_rows(parts, k * heads, (k + 1) * heads)
        factors.append(lax.rsqrt(total / (depth // groups) + eps))
      norm = norm_ref.at[following, own]
      return (
        hopper_tiles.load(residual_ref.at[some_rows, own], hopper_tiles.ROWS),
        hopper_tiles.load(norm, hopper_tiles.ROWS.reduce(0)),
        factors[0],
      ), factors

    def add(added, prepared):
      residual, norm, factor = prepared
      if groups == 1:
        added *= hopper_tiles.repeat(factor, 0, shape, hopper_tiles.ROWS)
      if config.in_prefetch and not interpret:

        @pl.when(layer + 1 < num_layers)
        def _():
          worker, workers = block * splits + split, blocks * splits
          product.prefetch(
            next_ref, following, config.in_prefetch, worker, workers
          )

      outs = new_ref, scaled_ref, new_squares_ref
      finish = lambda whole: stream.write(
        outs, whole, residual, norm, some_rows, tile
      )
      if tiles % each:
        pl.when(place < tiles)(lambda: finish(added))
      elif matmul.exchange:
        finish(added)
      else:
        stream.add_up(added, s, splits, finish)

    matmul.run(
      gated_ref, w_refs, block * matmul.columns, s,
      prefix=(layer,), split=split, prepare=prepare, finish=add,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    **stream.launch(matmul, width),
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(
    layer, gated, squares, weights.norm, residual,
    weights.in_proj[0], *weights.out_proj,
  )  # fmt: skip
