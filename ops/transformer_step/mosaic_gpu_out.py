"""The third and fifth kernel of a layer: a product onto the residual stream.

The stream is narrow: it has fewer blocks of columns than there are
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
from ops.hopper_tiles import ROWS
from ops.mamba2_step import mosaic_gpu_product as product

NAMES = ("transformer_step_o", "transformer_step_down")


def project(
  matmul, layer, x, value, norms, w, *, following, name, interpret
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Adds x @ w to the residual stream, and prepares the norm behind it.

  Args:
    matmul: The product.
    layer: (1,) int32.
    x: (N, K) bfloat16.
    value: The stream in front, (N, D) float32.
    norms: (L, D), scales of the norms of which one is behind.
    w: Of all layers, as the product takes them.
    following: How many layers further that norm is; the last layer's is the
      last one.
    name: Of the kernel, one of `NAMES`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    What a `mosaic_gpu.Residual` consists of.
  """
  rows, width = value.shape
  num_layers = norms.shape[0]
  columns, splits = matmul.columns, matmul.splits
  blocks = width // columns
  shape = rows, columns

  def kernel(
    layer_ref, x_ref, norm_ref, value_ref, w_ref, new_ref, scaled_ref,
    squares_ref, **s,
  ):  # fmt: skip
    layer = layer_ref[0]
    block = lax.axis_index("columns")
    split = lax.axis_index("split") if splits > 1 else 0
    own = pl.ds(block * columns, columns)
    behind = jnp.minimum(layer + following, num_layers - 1)

    def prepare(me):
      del me
      norm = norm_ref.at[behind, own]
      before = hopper_tiles.load(value_ref.at[:, own], ROWS)
      return (before, hopper_tiles.load(norm, ROWS.reduce(0))), ()

    def finish(added, before, norm):
      new = before + added
      hopper_tiles.store(new_ref.at[:, own], new)
      scaled = new * product.repeat(norm, 1, shape, ROWS)
      hopper_tiles.store(scaled_ref.at[:, own], scaled.astype(scaled_ref.dtype))
      hopper_tiles.store(squares_ref.at[:, block], jnp.sum(new * new, axis=1))

    def add(added, prepared):
      if splits == 1:
        finish(added, *prepared)
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
          hopper_tiles.load(s["others"].at[k], ROWS) for k in range(splits - 1)
        ]
        finish(functools.reduce(operator.add, others, added), *prepared)

    matmul.run(
      x_ref, [w_ref], block * columns, s,
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
    kernel_name=name,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(layer, x, norms, value, *w)
