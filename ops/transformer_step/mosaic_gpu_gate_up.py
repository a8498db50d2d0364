"""The fourth kernel of a layer: silu(gate_proj(y)) * up_proj(y)."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_tiles import ROWS, TILE
from ops.mamba2_step import mosaic_gpu_product as product
from ops.mamba2_step import mosaic_gpu_stream as stream
from ops.selective_scan.mosaic_gpu_tile import sigmoid
from ops.transformer_step.mosaic_gpu_ahead import bring

NAME = "transformer_step_gate_up"


def project(
  matmul, layer, residual, weights, *, width, parts, eps, ahead, interpret
) -> jax.Array:
  """Returns (N, F) bfloat16; a block owns the same columns of both matrices.

  Args:
    matmul: The product, of two tiles.
    layer: (1,) int32.
    residual: A `mosaic_gpu.Residual`.
    weights: Of all layers, see `mosaic_gpu.prepare`.
    width: F.
    parts: Of the sum of squares in `residual`.
    eps: Of the norm.
    ahead: Bytes of `down_proj` to bring to the cache, and its splits.
    interpret: False, or the parameters of the interpreter.
  """
  rows, depth = residual.scaled.shape
  matrices = weights.gate_proj, weights.up_proj

  def kernel(
    layer_ref, scaled_ref, squares_ref, next_ref, *refs, **s
  ):  # fmt: skip
    refs = iter(refs)
    both = [[next(refs) for _ in own] for own in matrices]
    (out_ref,) = refs
    layer, column = layer_ref[0], lax.axis_index("columns") * TILE
    split = lax.axis_index("split") if matmul.splits > 1 else 0

    def pick(j, copy):
      copy(both[j], column)

    def prepare(me):
      del me
      total = product.sum_of_rows(squares_ref, 0, parts)
      return lax.rsqrt(total / depth + eps), ()

    def finish(value, factor):
      bring(
        [next_ref], layer, *ahead,
        lax.axis_index("columns") * matmul.splits + split,
        width // TILE * matmul.splits,
      )  # fmt: skip
      stream.add_up(value, s, matmul.splits, lambda whole: write(whole, factor))

    def write(value, factor):
      sums = stream.sums_of(s)
      if matmul.splits > 1 or len(s["sums"].shape) > 2:
        # Both products are one array, which cannot be cut in registers.
        hopper_tiles.store(sums.at[:, pl.ds(0, 2 * TILE)], value)
      gate, up = (
        hopper_tiles.load(sums.at[:, pl.ds(j * TILE, TILE)], ROWS)
        * product.repeat(factor, 0, (rows, TILE), ROWS)
        for j in range(2)
      )
      middle = (gate * sigmoid(gate) * up).astype(jnp.bfloat16)
      hopper_tiles.store(out_ref.at[:, pl.ds(column, TILE)], middle)

    matmul.run(
      scaled_ref, both[0], 2 * column, s, split=split,
      prefix=(layer,), prepare=prepare, finish=finish, pick=pick,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
    grid=(width // TILE,),
    grid_names=("columns",),
    **matmul.launch(),
    **stream.shared(matmul),
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(
    layer, residual.scaled, residual.squares, weights.down_proj[0],
    *(one for own in matrices for one in own),
  )  # fmt: skip
