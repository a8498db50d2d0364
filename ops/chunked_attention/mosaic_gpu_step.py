"""The Mosaic GPU `chunked_attention_step` for Hopper: one kernel a layer.

A thread block takes some tiles of 64 keys of a row's key head, of chunks first
and then of the ring, as `hopper_attention` does. What blocks found, and the
token itself, are merged by XLA by their log-sum-exp. Bytes bound it: at 32,768
tokens, P = 4 and 8 heads of 64, 16 rows have .27 GB of chunk keys and values a
layer, .056 ms of an H200's memory.

Rows of chunks and rings have any number of slots. A tile that reaches beyond
them is filled up with zeros by the copy.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import dispatch, hopper_attention, hopper_tiles
from ops.hopper import PROCESSORS, SHARED_MEMORY
from ops.hopper_attention import OF_TILE, QUERIES
from ops.hopper_tiles import TILE

NAME = "chunked_attention_step"
HEAD_SIZES = (64, 128)
_LOG2E = 1 / np.log(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched.

  Attributes:
    splits: Thread blocks that share the keys of a row's head.
    stages: Tiles of 64 keys or values in shared memory.
  """

  splits: int = 1
  stages: int = 8


def configure(
  batch: int, heads: int, size: int, chunks: int, ring: int
) -> Config:
  """Returns the Config for B, N, K, M and R; pure.

  Two blocks run on a multiprocessor. Shared memory holds no more scores than
  leave room for tiles in flight. On an H200 blocks of less than two tiles cost
  more to merge than they save (.0137 instead of .0172 ms for 18 tiles of a
  row's head), and those of more than eight keep too few tiles in flight (.103
  instead of .127 ms for 130 tiles of each of 128 heads).
  """
  tiles = _tiles(chunks) + _tiles(ring)
  wanted = max(1, 2 * PROCESSORS // (batch * heads))
  most = SHARED_MEMORY // 4 // OF_TILE
  wanted = min(max(wanted, -(-tiles // 8)), -(-tiles // 2))
  splits = min(max(wanted, -(-tiles // most)), tiles)
  free = SHARED_MEMORY // 2 - 8192 - OF_TILE * -(-tiles // splits)
  return Config(
    splits=splits, stages=max(2, min(free // (2 * TILE * size), 16))
  )


def _tiles(slots):
  return -(-slots // TILE)


def supports(
  q=None, k=None, v=None, chunk_k=None, chunk_v=None, ring_k=None, ring_v=None
) -> str | None:
  """Returns None where `forward` runs on these arguments, else why not."""
  if reason := dispatch.needs_wgmma():
    return reason
  if q is None:
    return None
  return unfit(q, k, v, chunk_k, chunk_v, ring_k, ring_v)


def unfit(q, k, v, chunk_k, chunk_v, ring_k, ring_v) -> str | None:
  """Returns None if the kernel takes these shapes and dtypes, else why not."""
  named = {
    "q": q, "k": k, "v": v, "chunk_k": chunk_k, "chunk_v": chunk_v,
    "ring_k": ring_k, "ring_v": ring_v,
  }  # fmt: skip
  for name, array in named.items():
    if array.dtype != jnp.bfloat16:
      return f"needs bfloat16, {name} is {array.dtype}"
  heads, size = k.shape[1:]
  if size not in HEAD_SIZES:
    return f"needs heads of 64 or 128, chunk_k is {chunk_k.shape}"
  if q.shape[1] > QUERIES * heads:
    return f"needs at most {QUERIES} queries to a key"
  if not chunk_k.size and not ring_k.size:
    return "needs a slot for a chunk or for a token"
  return None


def forward(
  q, k, v, chunk_k, chunk_v, ring_k, ring_v, layer, chunks, near,
  *, scale, interpret=False, config=None,
) -> jax.Array:  # fmt: skip
  """Implements `chunked_attention_step` on Hopper; arguments as there.

  `interpret` is False or `InterpretGPUParams`; `config` is by default that of
  `configure`.
  """
  if reason := unfit(q, k, v, chunk_k, chunk_v, ring_k, ring_v):
    raise ValueError(f"chunked_attention_step: the Mosaic GPU kernel {reason}")
  batch, heads, size = k.shape
  slots = chunk_k.shape[2], ring_k.shape[2]
  config = config or configure(batch, heads, size, *slots)
  # An array without a slot is not to be read, so another stands in its place.
  if not slots[0]:
    chunk_k, chunk_v = ring_k, ring_v
  if not slots[1]:
    ring_k, ring_v = chunk_k, chunk_v
  own = q.reshape(batch, heads, -1, size)
  shared = own.shape[2]
  padded = jnp.pad(own, ((0, 0), (0, 0), (0, QUERIES - shared), (0, 0)))
  found = attend(
    layer.reshape(1), padded, (chunk_k, ring_k), (chunk_v, ring_v),
    jnp.minimum(jnp.stack([chunks, near], axis=1), np.int32([slots])),
    tiles=sum(map(_tiles, slots)), scale=scale * _LOG2E, config=config,
    interpret=interpret,
  )  # fmt: skip
  mixed, top, total = (one[:, :, :, :shared] for one in found)
  wide = lambda x: x.astype(jnp.float32)
  itself = (scale * _LOG2E) * jnp.sum(wide(own) * wide(k)[:, :, None], axis=-1)
  value = jnp.broadcast_to(wide(v)[:, :, None], own.shape)
  behind = lambda some, one: jnp.concatenate([some, one[:, :, None]], axis=2)
  mixed = hopper_attention.merged(
    behind(mixed, value),
    behind(top, itself),
    behind(total, jnp.ones_like(itself)),
  )
  return mixed.reshape(q.shape).astype(q.dtype)


def attend(
  layer, q, keys, values, counts, *, tiles, scale, config, interpret
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Attends to chunks and to the ring, a share of their tiles in each split.

  Args:
    layer: (1,) int32.
    q: (B, N, 8, K) bfloat16.
    keys: Those of chunks and of the ring, (L, B, M, N, K) and (L, B, R, N, K).
    values: Alike.
    counts: (B, 2) int32, slots of both that are seen.
    tiles: That there are at most.
    scale: Of logits to base 2.
    config: A Config.
    interpret: False, or the parameters of the interpreter.

  Returns:
    As `hopper_attention.outputs`, of blocks (B, N, splits).
  """
  batch, heads, _, size = q.shape
  splits, parts = config.splits, size // TILE
  most = -(-tiles // splits)

  def kernel(
    layer_ref, q_ref, counts_ref, chunk_k_ref, ring_k_ref, chunk_v_ref,
    ring_v_ref, mixed_ref, most_ref, total_ref, *, ring, **s,
  ):  # fmt: skip
    # The same memory as copies fill it, row by row, and as products read it.
    landing, s["ring"] = (ring, ring) if interpret else ring
    split, head, row = (
      lax.axis_index(name) for name in ("split", "head", "row")
    )
    layer = layer_ref[0]
    far_slots, near_slots = counts_ref[row, 0], counts_ref[row, 1]
    whole = lambda slots: lax.div(slots + TILE - 1, jnp.int32(TILE))
    far_tiles = whole(far_slots)
    filled = far_tiles + whole(near_slots)
    begin, end = (
      lax.div((split + i) * filled, jnp.int32(splits)) for i in range(2)
    )

    def copy(refs, tile, slot):
      def one(ref, first):
        own = pl.ds(pl.multiple_of(first * TILE, TILE), TILE)
        for part in range(parts):
          plgpu.copy_gmem_to_smem(
            ref.at[layer, row, own, head, pl.ds(part * TILE, TILE)],
            landing.at[slot, part],
            s["loaded"].at[slot],
          )

      at, (far, near) = begin + tile, refs
      pl.when(at < far_tiles)(lambda: one(far, at))
      pl.when(at >= far_tiles)(lambda: one(near, at - far_tiles))

    def seen(tile):
      at = begin + tile
      return jnp.where(
        at < far_tiles,
        far_slots - at * TILE,
        near_slots - (at - far_tiles) * TILE,
      )

    hopper_attention.fetch_queries(q_ref.at[row, head], s)
    outs = (
      ref.at[row, head, split] for ref in (mixed_ref, most_ref, total_ref)
    )
    hopper_attention.attend(
      copy, (chunk_k_ref, ring_k_ref), (chunk_v_ref, ring_v_ref),
      functools.partial(hopper_attention.write, tuple(outs)), s,
      count=end - begin, seen=seen, scale=scale,
    )  # fmt: skip

  scratch = hopper_attention.scratch(
    parts=parts, tiles=most, stages=config.stages
  )
  if not interpret:
    # A copy to memory that is cut into tiles of 8 rows has to begin and end at
    # such a tile of the cache.
    by_rows = plgpu.SMEM(
      (config.stages, parts, TILE, TILE), jnp.bfloat16,
      transforms=(plgpu.SwizzleTransform(2 * TILE),),
    )  # fmt: skip
    scratch["ring"] = plgpu.RefUnion(by_rows, scratch["ring"])
  run = plgpu.kernel(
    kernel,
    out_type=hopper_attention.outputs((batch, heads, splits), size),
    grid=(splits, heads, batch),
    grid_names=("split", "head", "row"),
    scratch_types=scratch,
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(layer, q, counts, *keys, *values)
