"""The first kernel of a layer: `in_proj` and the step of the convolution."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.mamba2_step import mosaic_gpu_product as product
from ops.mamba2_step import mosaic_gpu_stream as stream
from ops.selective_scan.mosaic_gpu_tile import sigmoid

NAME = "mamba2_step_in"


def project(
  matmul,
  layer,
  scaled,
  squares,
  weights,
  conv_state,
  *,
  eps,
  config,
  interpret,
) -> jax.Array:
  """Returns z, silu(conv(x, B, C)) and dt, (N, F filled up) float32.

  A thread block owns some columns, or some rows of them. As all are of one
  kind, and of no other block, it steps their convolution in place. A row is
  normed by a factor after the product, from the sum of the squares of the row.

  Args:
    matmul: The product, see `mosaic_gpu.prepare`.
    layer: (1,) int32.
    scaled: The residual stream times the scale of the norm, (N, D) bfloat16.
    squares: Parts of the sum of its squares, see `mosaic_gpu.Residual`.
    weights: Of all layers, as `mosaic_gpu.layer` makes them.
    conv_state: A reference to (L, B, K-1, C).
    eps: Of the norm.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.
  """
  rows, depth = scaled.shape
  taps, channels = conv_state.shape[2:]
  e, heads = weights.gated_norm.shape[1], weights.D.shape[1]
  width = e + channels + heads
  blocks, splits = -(-width // matmul.columns), matmul.splits
  shape = matmul.finished
  columns = shape[1]
  parts = depth // config.out_columns
  spread = lambda vector, axis: hopper_tiles.repeat(
    vector, axis, shape, hopper_tiles.ROWS
  )

  def kernel(
    layer_ref, scaled_ref, squares_ref, taps_ref, bias_ref, next_ref, conv_ref,
    *refs, conv_s, conv_loaded, **s,
  ):  # fmt: skip
    *w_refs, out_ref = refs
    layer = layer_ref[0]
    block = lax.axis_index("columns")
    split = lax.axis_index("split") if splits > 1 else 0
    me = lax.axis_index("warpgroup") if matmul.workers > 1 else 0
    column = block * matmul.columns
    if columns < matmul.columns:
      column += me * columns
    channel = column - e
    convolves = (channel >= 0) & (channel < channels)
    some_rows = matmul.own_rows(me, split)
    # Rows past the end of the batch are read as zeros, and not written.
    first = lax.axis_index("rows") * rows + some_rows.start
    own = conv_ref.at[layer, pl.ds(first, shape[0]), :, pl.ds(channel, columns)]
    worker = jnp.minimum(me, matmul.workers - 1)
    conv_s, conv_loaded = conv_s.at[worker], conv_loaded.at[worker]

    def prepare(me):
      @pl.when(convolves & (me < matmul.workers))
      def _():
        plgpu.copy_gmem_to_smem(own, conv_s, conv_loaded)

      total = product.sum_of_rows(squares_ref.at[some_rows], 0, parts)
      factor = lax.rsqrt(total / depth + eps)
      # Those of other columns are not used.
      here = pl.ds(jnp.clip(channel, 0, channels - columns), columns)
      per_column = [bias_ref.at[layer, here]]
      per_column += [taps_ref.at[layer, k, here] for k in range(taps + 1)]
      vectors = [
        hopper_tiles.load(v, hopper_tiles.ROWS.reduce(0)) for v in per_column
      ]
      return (factor, vectors), ()

    def finish(value, prepared):
      factor, (bias, *weight) = prepared
      if config.out_prefetch and not interpret and matmul.workers == 1:
        product.prefetch(next_ref, layer, config.out_prefetch, block, blocks)
      value *= spread(factor, 0)
      target = out_ref.at[some_rows, pl.ds(column, columns)]

      @pl.when(convolves)
      def _():
        plgpu.barrier_wait(conv_loaded)
        inputs = [
          plgpu.load(conv_s.at[:, k], layout=hopper_tiles.ROWS, optimized=False)
          for k in range(taps)
        ]
        inputs.append(value.astype(conv_s.dtype))
        mixed = spread(bias, 1)
        for tap, kept in zip(weight, inputs):
          mixed += spread(tap, 1) * kept.astype(jnp.float32)
        hopper_tiles.store(target, mixed * sigmoid(mixed))
        for k in range(taps):
          hopper_tiles.store(conv_s.at[:, k], inputs[k + 1])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(conv_s, own)
        plgpu.wait_smem_to_gmem(0)

      @pl.when(jnp.logical_not(convolves))
      def _():
        hopper_tiles.store(target, value)

    matmul.run(
      scaled_ref, w_refs, block * matmul.columns, s,
      prefix=(layer,), split=split, prepare=prepare, finish=finish,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((rows, blocks * matmul.columns), jnp.float32),
    grid=(blocks, 1),
    grid_names=("columns", "rows"),
    **stream.cluster(splits),
    **matmul.launch(),
    scratch_types={
      **matmul.scratch(),
      "conv_s": plgpu.SMEM(
        (matmul.workers, shape[0], taps, columns), conv_state.dtype
      ),
      "conv_loaded": plgpu.Barrier(num_barriers=matmul.workers),
    },
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(
    layer, scaled, squares, weights.conv_weight, weights.conv_bias,
    weights.out_proj[0], conv_state, *weights.in_proj,
  )  # fmt: skip
