"""The third kernel of a layer: `out_proj`, and the norm of the next layer.

The residual stream is narrow: it has fewer blocks of columns than there are
multiprocessors. So the blocks of a cluster may share K; the first one adds up
what the others store to its shared memory.
"""

import functools
import operator

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.mamba2_step import mosaic_gpu_product as product

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
  columns = matmul.columns
  blocks = width // columns
  splits = matmul.splits
  if width % columns or (splits > 1 and groups > 1):
    raise ValueError(
      f"mamba2_step: {columns} out_columns must divide the width {width}, and"
      f" {splits} out_splits need a norm of one group, not {groups}"
    )
  shape = rows, columns

  def kernel(
    layer_ref, gated_ref, squares_ref, norm_ref, residual_ref, next_ref, *refs,
    **s,
  ):  # fmt: skip
    *w_refs, new_ref, scaled_ref, new_squares_ref = refs
    layer = layer_ref[0]
    block = lax.axis_index("columns")
    split = lax.axis_index("split") if splits > 1 else 0
    own = pl.ds(block * columns, columns)
    following = jnp.minimum(layer + 1, num_layers - 1)

    def prepare(me):
      del me
      factors = []
      for k in range(groups):
        total = product.sum_of_rows(squares_ref, k * heads, (k + 1) * heads)
        factors.append(lax.rsqrt(total / (depth // groups) + eps))
      norm = norm_ref.at[following, own]
      return (
        hopper_tiles.load(residual_ref.at[:, own], hopper_tiles.ROWS),
        hopper_tiles.load(norm, hopper_tiles.ROWS.reduce(0)),
        factors[0],
      ), factors

    def finish(added, residual, norm):
      new = residual + added
      hopper_tiles.store(new_ref.at[:, own], new)
      scaled = new * product.repeat(norm, 1, shape, hopper_tiles.ROWS)
      hopper_tiles.store(scaled_ref.at[:, own], scaled.astype(scaled_ref.dtype))
      hopper_tiles.store(
        new_squares_ref.at[:, block], jnp.sum(new * new, axis=1)
      )

    def add(added, prepared):
      residual, norm, factor = prepared
      if groups == 1:
        added *= product.repeat(factor, 0, shape, hopper_tiles.ROWS)
      if config.in_prefetch and not interpret:

        @pl.when(layer + 1 < num_layers)
        def _():
          worker, workers = block * splits + split, blocks * splits
          product.prefetch(
            next_ref, following, config.in_prefetch, worker, workers
          )

      if splits == 1:
        finish(added, residual, norm)
        return

      @pl.when(split > 0)
      def _():
        plgpu.async_store_smem(
          added, s["others"].at[split - 1], s["arrived"],
          cluster_idx=jnp.int32(0), cluster_dim="split", optimized=False,
        )  # fmt: skip

      @pl.when(split == 0)
      def _():
        plgpu.barrier_wait(s["arrived"])
        others = [
          hopper_tiles.load(s["others"].at[k], hopper_tiles.ROWS)
          for k in range(splits - 1)
        ]
        finish(functools.reduce(operator.add, others, added), residual, norm)

    matmul.run(
      gated_ref, w_refs, block * columns, s,
      prefix=(layer,), split=split, prepare=prepare, finish=add,
    )  # fmt: skip

  scratch, cluster = matmul.scratch(), {}
  if splits > 1:
    cluster = {"cluster": (splits,), "cluster_names": ("split",)}
    scratch["others"] = plgpu.SMEM(
      (splits - 1, *shape),
      jnp.float32,
      transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
    )
    scratch["arrived"] = plgpu.Barrier(num_arrivals=splits - 1)
  padded = -(-blocks // product.PARTIALS) * product.PARTIALS
  run = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((rows, width), jnp.float32),
      jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
      jax.ShapeDtypeStruct((rows, padded), jnp.float32),
    ),
    grid=(blocks,),
    grid_names=("columns",),
    **cluster,
    **matmul.launch(),
    scratch_types=scratch,
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(
    layer, gated, squares, weights.norm, residual, weights.in_proj[0],
    *weights.out_proj,
  )  # fmt: skip
