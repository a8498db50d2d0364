"""The second kernel of a layer: attention, split over the keys of a row.

A thread block takes some tiles of 64 slots of a row's key/value head, as
`hopper_attention` does. What blocks found is merged by XLA.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_attention, hopper_tiles
from ops.hopper_attention import QUERIES
from ops.hopper_tiles import TILE

NAME = "transformer_step_attend"


def attend(
  layer, q, caches, lengths, *, shared, splits, stages, interpret
) -> jax.Array:
  """Returns the mixed heads of each row, (B, N, G K) bfloat16.

  Args:
    layer: (1,) int32.
    q: Rotated queries, eight a key/value head, (rows, heads, K) bfloat16, as
      `mosaic_gpu_qkv` makes them.
    caches: References to keys and values, (L, B, S, N, K), with the new ones.
    lengths: (B,) int32, slots that are filled, the new ones among them.
    shared: G, queries of a key/value head.
    splits: Blocks that share a row's head.
    stages: Tiles of keys or values in shared memory.
    interpret: False, or the parameters of the interpreter.
  """
  batch, slots, heads, size = caches[0].shape[1:]
  parts, most = size // TILE, -(-slots // (TILE * splits))

  def kernel(
    layer_ref, q_ref, lengths_ref, keys_ref, values_ref, mixed_ref, most_ref,
    total_ref, **s,
  ):  # fmt: skip
    split, head, row = (
      lax.axis_index(name) for name in ("split", "head", "row")
    )
    layer, length = layer_ref[0], lengths_ref[row]
    filled = jnp.minimum(
      lax.div(length + TILE - 1, jnp.int32(TILE)), jnp.int32(slots // TILE)
    )
    begin, end = (
      lax.div((split + i) * filled, jnp.int32(splits)) for i in range(2)
    )

    def copy(ref, tile, slot):
      own = pl.ds((begin + tile) * TILE, TILE)
      for part in range(parts):
        plgpu.copy_gmem_to_smem(
          ref.at[layer, row, own, head, pl.ds(part * TILE, TILE)],
          s["ring"].at[slot, part],
          s["loaded"].at[slot],
        )

    hopper_attention.fetch_queries(
      q_ref.at[row, pl.ds(head * QUERIES, QUERIES)], s
    )
    outs = (
      ref.at[row, head, split] for ref in (mixed_ref, most_ref, total_ref)
    )
    hopper_attention.attend(
      copy, keys_ref, values_ref, tuple(outs), s,
      count=end - begin, seen=lambda tile: length - (begin + tile) * TILE,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    out_type=hopper_attention.outputs((batch, heads, splits), size),
    grid=(splits, heads, batch),
    grid_names=("split", "head", "row"),
    scratch_types=hopper_attention.scratch(
      parts=parts, tiles=most, stages=stages
    ),
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  found = run(layer, q, lengths, *caches)
  mixed = hopper_attention.merged(*(one[:, :, :, :shared] for one in found))
  return mixed.astype(jnp.bfloat16).reshape(batch, -1)
