"""The second kernel of a layer: attention, split over the keys of a row.

A thread block takes some tiles of 64 slots of a row's key/value head, as
`hopper_attention` does. What blocks found is merged in the first block of a
cluster, or by XLA where more blocks than a cluster has share a head.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_attention, hopper_tiles
from ops.hopper_attention import QUERIES
from ops.hopper_tiles import TILE
from ops.transformer_step.mosaic_gpu_ahead import bring

NAME = "transformer_step_attend"


def attend(
  layer, q, caches, lengths, coming, *, shared, splits, cluster, stages, ahead,
  interpret,
) -> jax.Array:  # fmt: skip
  """Returns the mixed heads, (rows, H K) bfloat16; of rows past B anything.

  Args:
    layer: (1,) int32.
    q: Rotated queries, eight a key/value head, (rows, heads, K) bfloat16, as
      `mosaic_gpu_qkv` makes them.
    caches: References to keys and values, (L, B, S, N, K), with the new ones.
    lengths: (B,) int32, slots that are filled, the new ones among them.
    coming: Weights of the product after the next one, of one K.
    shared: G, queries of a key/value head.
    splits: Blocks that share a row's head.
    cluster: Whether these are a cluster.
    stages: Tiles of keys or values in shared memory.
    ahead: Bytes of `coming` to bring to the cache, and the splits of these.
    interpret: False, or the parameters of the interpreter.
  """
  batch, slots, heads, size = caches[0].shape[1:]
  parts, most = size // TILE, -(-slots // (TILE * splits))

  def kernel(layer_ref, q_ref, lengths_ref, keys_ref, values_ref, *refs, **s):
    next_refs, outs = refs[: len(coming)], refs[len(coming) :]
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

    def finish(*found):
      block = (row * heads + head) * splits + split
      bring(next_refs, layer, *ahead, block, batch * heads * splits)
      if cluster:
        own = outs[0].at[row, pl.ds(head * shared, shared)]
        hopper_attention.merge(own, s, "split", *found)
      else:
        own = tuple(ref.at[row, head, split] for ref in outs)
        hopper_attention.write(own, *found)

    hopper_attention.attend(
      copy, keys_ref, values_ref, finish, s,
      count=end - begin, seen=lambda tile: length - (begin + tile) * TILE,
    )  # fmt: skip

  scratch = hopper_attention.scratch(parts=parts, tiles=most, stages=stages)
  rows, across = q.shape[0], {"row": batch, "head": heads}
  if cluster:
    more, launch = hopper_attention.shared_by(splits, parts, "split")
    scratch |= more
    outputs = jax.ShapeDtypeStruct((rows, heads * shared, size), jnp.bfloat16)
  else:
    across, launch = {"split": splits} | across, {}
    outputs = hopper_attention.outputs((batch, heads, splits), size)
  run = plgpu.kernel(
    kernel,
    out_type=outputs,
    grid=tuple(across.values()),
    grid_names=tuple(across),
    scratch_types=scratch,
    **launch,
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  found = run(layer, q, lengths, *caches, *coming)
  if cluster:
    return found.reshape(rows, -1)
  mixed = hopper_attention.merged(*(one[:, :, :, :shared] for one in found))
  mixed = mixed.astype(jnp.bfloat16).reshape(batch, -1)
  return jnp.pad(mixed, ((0, rows - batch), (0, 0)))
