"""The third and fifth kernel of a layer: a product onto the residual stream.

Blocks of a cluster may share K, as `mosaic_gpu_stream` has it.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_tiles import ROWS
from ops.mamba2_step import mosaic_gpu_stream as stream
from ops.transformer_step.mosaic_gpu_ahead import bring

NAMES = ("transformer_step_o", "transformer_step_down")


def project(
  matmul,
  layer,
  x,
  value,
  norms,
  w,
  coming,
  *,
  following,
  name,
  ahead,
  past,
  interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Adds x @ w to the residual stream, and prepares the norm behind it.

  Args:
    matmul: The product.
    layer: (1,) int32.
    x: (N, K) bfloat16.
    value: The stream in front, (N, D) float32.
    norms: (L, D), scales of the norms of which one is behind.
    w: Of all layers, as the product takes them.
    coming: Weights of the kernel behind, of one K.
    following: How many layers further that norm is; the last layer's is the
      last one.
    name: Of the kernel, one of `NAMES`.
    ahead: Bytes of `coming` to bring to the cache, and the splits of these.
    past: How often so many have been brought before.
    interpret: False, or the parameters of the interpreter.

  Returns:
    What a `mosaic_gpu.Residual` consists of.
  """
  width, num_layers = value.shape[1], norms.shape[0]
  columns, splits = matmul.columns, matmul.splits

  def kernel(layer_ref, x_ref, norm_ref, value_ref, *refs, **s):
    w_refs, refs = refs[: len(w)], refs[len(w) :]
    *next_refs, new_ref, scaled_ref, squares_ref = refs
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

    def add(added, prepared):
      @pl.when(layer + following < num_layers)
      def _():
        bring(
          next_refs, behind, *ahead, block * splits + split,
          width // columns * splits, past=past,
        )  # fmt: skip

      outs = new_ref, scaled_ref, squares_ref
      stream.add_up(
        added, s, splits, lambda whole: stream.write(outs, whole, *prepared)
      )

    matmul.run(
      x_ref, w_refs, block * columns, s,
      prefix=(layer,), split=split, prepare=prepare, finish=add,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    **stream.launch(matmul, width),
    kernel_name=name,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(layer, x, norms, value, *w, *coming)
