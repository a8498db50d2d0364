"""The first kernel of a layer: queries, keys and values of the new token.

A thread block owns the columns of one head of one of the three matrices. It
rotates queries and keys, and writes keys and values where the cache has them.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_attention import QUERIES
from ops.hopper_tiles import TILE
from ops.mamba2_step import mosaic_gpu_product as product
from ops.mamba2_step import mosaic_gpu_stream as stream
from ops.transformer_step.mosaic_gpu_ahead import bring

NAME = "transformer_step_qkv"
# Half a head of 64: every fourth row to a warp, a number to a thread.
_HALF = plgpu.Layout.TILED(plgpu.Tiling(((4, 32), (1,))), (-3,), (-2,), -1)


def project(
  matmul, layer, residual, weights, caches, lengths, turns, *, heads, parts,
  eps, ahead, interpret,
) -> jax.Array:  # fmt: skip
  """Returns the rotated queries, (N, heads, K) bfloat16.

  There are eight a key/value head, the last of which hold anything where fewer
  share it. They are scaled so that scores are logarithms to the base 2. The
  norm in front is a factor of each row, which follows the product.

  Args:
    matmul: The product, of a head's columns.
    layer: (1,) int32.
    residual: A `mosaic_gpu.Residual`.
    weights: Of all layers, see `mosaic_gpu.prepare`.
    caches: References to keys and values, (L, B, S, N, K).
    lengths: (B,) int32.
    turns: Cosines and sines, (2, N, K / 2) float32.
    heads: H.
    parts: Of the sum of squares in `residual`.
    eps: Of the norm.
    ahead: Bytes of `o_proj` to bring to the cache, and its splits.
    interpret: False, or the parameters of the interpreter.
  """
  rows, depth = residual.scaled.shape
  batch, slots, kv_heads, size = caches[0].shape[1:]
  half = size // 2
  layout = _HALF if half < TILE else hopper_tiles.ROWS
  matrices = weights.q_proj, weights.k_proj, weights.v_proj
  factor_of_scores = size**-0.5 * 1.4426950408889634

  def kernel(
    layer_ref, scaled_ref, squares_ref, lengths_ref, turns_ref, next_ref,
    *refs, new_s, **s,
  ):  # fmt: skip
    refs = iter(refs)
    q_refs, k_refs, v_refs = ([next(refs) for _ in own] for own in matrices)
    keys_ref, values_ref, out_ref = refs
    layer, head = layer_ref[0], lax.axis_index("head")
    split = lax.axis_index("split") if matmul.splits > 1 else 0
    is_q, is_v = head < heads, head >= heads + kv_heads

    def pick(j, copy):
      first = j * TILE
      pl.when(is_q)(lambda: copy(q_refs, head * size + first))
      pl.when(jnp.logical_not(is_q | is_v))(
        lambda: copy(k_refs, (head - heads) * size + first)
      )
      pl.when(is_v)(
        lambda: copy(v_refs, (head - heads - kv_heads) * size + first)
      )

    def prepare(me):
      del me
      total = product.sum_of_rows(squares_ref, 0, parts)
      return lax.rsqrt(total / depth + eps), ()

    def finish(value, factor):
      bring(
        [next_ref], layer, *ahead, head * matmul.splits + split,
        (heads + 2 * kv_heads) * matmul.splits,
      )  # fmt: skip
      stream.add_up(value, s, matmul.splits, lambda whole: write(whole, factor))

    def write(value, factor):
      value *= product.repeat(factor, 0, value.shape, hopper_tiles.ROWS)
      sums = stream.sums_of(s)
      hopper_tiles.store(sums.at[:, pl.ds(0, size)], value)
      ends = [
        hopper_tiles.load(sums.at[:, pl.ds(start, half)], layout)
        for start in (0, half)
      ]
      cos, sin = (hopper_tiles.load(turns_ref.at[i], layout) for i in range(2))
      turned = ends[0] * cos - ends[1] * sin, ends[1] * cos + ends[0] * sin

      @pl.when(is_q)
      def _():
        shared = heads // kv_heads
        place = lax.div(head, jnp.int32(shared)) * QUERIES
        place += lax.rem(head, jnp.int32(shared))
        for i, part in enumerate(turned):
          target = out_ref.at[:, place, pl.ds(i * half, half)]
          part = (part * factor_of_scores).astype(jnp.bfloat16)
          hopper_tiles.store(target, part)

      def keep(halves, ref, index):
        for i, part in enumerate(halves):
          target = new_s.at[:, pl.ds(i * half, half)]
          hopper_tiles.store(target, part.astype(jnp.bfloat16))
        plgpu.commit_smem()

        @pl.loop(0, batch)
        def _(row):
          slot = lengths_ref[row]

          @pl.when(slot < slots)
          def _():
            target = ref.at[layer, row, slot, index]
            plgpu.copy_smem_to_gmem(new_s.at[row], target)

        plgpu.wait_smem_to_gmem(0)

      pl.when(jnp.logical_not(is_q | is_v))(
        lambda: keep(turned, keys_ref, head - heads)
      )
      pl.when(is_v)(lambda: keep(ends, values_ref, head - heads - kv_heads))

    matmul.run(
      scaled_ref, q_refs, head * size, s, split=split,
      prefix=(layer,), prepare=prepare, finish=finish, pick=pick,
    )  # fmt: skip

  options = stream.shared(matmul)
  options["scratch_types"]["new_s"] = plgpu.SMEM((rows, size), jnp.bfloat16)
  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(
      (rows, kv_heads * QUERIES, size), jnp.bfloat16
    ),
    grid=(heads + 2 * kv_heads,),
    grid_names=("head",),
    **matmul.launch(),
    **options,
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(
    layer, residual.scaled, residual.squares, lengths, turns,
    weights.o_proj[0], *(one for own in matrices for one in own), *caches,
  )  # fmt: skip
