"""A key and a value of each chunk, and those of the last tokens in a ring.

Shapes by axis letter: L layers, B batch, T new tokens, M chunks, R ring slots,
H query heads, N key/value heads, K head dimension.
"""

import dataclasses
import itertools
from typing import Self

import jax
import jax.numpy as jnp

from models.caches.dense import attend_in_parts
from models.errors import InputError
from ops.chunked_attention import UNUSED, chunked_attention_step
from ops.top_mask import top_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTokens:
  """What new tokens of one layer, or of all, add to a cache.

  Attributes:
    k: (..., B, T, N, K), rotated.
    v: alike; None where keys are values too.
    chunk_k: (..., B, T, N, K), key of the chunk that each token would close;
      None for `k`.
    chunk_v: alike.
    closed: (..., B, T) bool, the tokens at which chunks end.
    seen_from: (..., B, T) int32, first slots that see these chunks.
  """

  k: jax.Array
  v: jax.Array | None
  chunk_k: jax.Array | None
  chunk_v: jax.Array | None
  closed: jax.Array
  seen_from: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedCache:
  """Keys and values of the chunks and last tokens of L layers.

  One layer's has no axis L. Values are None where keys are values too.

  Attributes:
    chunk_k: (L, B, M, N, K), rotated.
    chunk_v: alike.
    seen_from: (L, B, M) int32, first slots that see the chunks; `UNUSED` behind
      the last one.
    ring_k: (L, B, R, N, K) of the last R tokens; that at slot s is at s % R.
    ring_v: alike.
  """

  chunk_k: jax.Array
  chunk_v: jax.Array | None
  seen_from: jax.Array
  ring_k: jax.Array
  ring_v: jax.Array | None

  @classmethod
  def empty(
    cls,
    rows: tuple[int, int],
    chunks: int,
    window: int,
    heads: tuple[int, int],
    dtype: jnp.dtype,
    *,
    share_kv: bool,
  ) -> Self:
    """A cache that holds nothing.

    Args:
      rows: (L, B).
      chunks: M.
      window: R.
      heads: (N, K).
      dtype: of keys and values.
      share_kv: whether keys are values too.
    """
    # Every field has an array of its own, because a buffer that is donated must
    # not be there twice.
    zeros = lambda size: jnp.zeros((*rows, size, *heads), dtype)
    return cls(
      chunk_k=zeros(chunks),
      chunk_v=None if share_kv else zeros(chunks),
      seen_from=jnp.full((*rows, chunks), UNUSED, jnp.int32),
      ring_k=zeros(window),
      ring_v=None if share_kv else zeros(window),
    )

  def attend(
    self,
    q: jax.Array,
    new: NewTokens,
    slots: jax.Array,
    top: int | None = None,
  ) -> jax.Array:
    """Attention of new tokens to one layer's old ones and to each other.

    Args:
      q: (B, T, H, K).
      new: of this layer.
      slots: (B, T) int32, consecutive slots of the tokens.
      top: chunks that a token sees, those of the highest scores; None for all.

    Returns:
      (B, T, H, K).
    """
    window = self.ring_k.shape[1]
    at, of = slots[:, :, None], slots[:, None]
    keys = [self.chunk_k, self.ring_k, new.k]
    values = [self.chunk_v, self.ring_v, new.v]
    masks = [
      self.seen_from[:, None] <= at,
      self._in_ring(slots) >= at - window,
      (of <= at) & (of >= at - window),
    ]
    # A token does not see the chunk that it closes.
    if slots.shape[1] > 1:
      keys.append(new.k if new.chunk_k is None else new.chunk_k)
      values.append(new.v if new.chunk_k is None else new.chunk_v)
      masks.append(new.closed[:, None] & (new.seen_from[:, None] <= at))
    values = keys if new.v is None else values
    if top is not None:
      # The chunks of the cache, and those that new tokens closed.
      parts = [i for i in (0, 3) if i < len(keys)]
      for i, mask in zip(parts, _best(q, keys, masks, parts, top), strict=True):
        masks[i] = mask
    return attend_in_parts(q, keys, values, masks)

  def _in_ring(self, slots):
    """Slots (B, 1, R) of the tokens in the ring; far below 0 for none."""
    size, length = self.ring_k.shape[1], slots[:, :1]
    places = jnp.arange(size, dtype=jnp.int32)[None]
    found = length - 1 - (length - 1 - places) % max(size, 1)
    return jnp.where(found < 0, -UNUSED, found)[:, None]

  def append(self, new: NewTokens, slots: jax.Array) -> "ChunkedCache":
    """Writes the new tokens of all layers; chunks past the end are dropped.

    Args:
      new: of all layers, with axis L.
      slots: (B, T) int32.
    """
    filled = jnp.sum(self.seen_from < UNUSED, axis=-1, dtype=jnp.int32)
    rank = jnp.cumsum(new.closed, axis=-1, dtype=jnp.int32) - 1
    to_chunk = jnp.where(new.closed, filled[..., None] + rank, UNUSED)
    size, count = self.ring_k.shape[2], slots.shape[1]
    # Of more tokens than the ring has slots, the last stay.
    late = jnp.arange(count, dtype=jnp.int32) >= count - size
    to_ring = jnp.where(late[None], slots % max(size, 1), UNUSED)
    to_ring = jnp.broadcast_to(to_ring[None], to_chunk.shape)
    chunk_k = new.k if new.chunk_k is None else new.chunk_k
    chunk_v = new.v if new.chunk_k is None else new.chunk_v
    return ChunkedCache(
      chunk_k=_written(self.chunk_k, chunk_k, to_chunk),
      chunk_v=_written(self.chunk_v, chunk_v, to_chunk),
      seen_from=_written(self.seen_from, new.seen_from, to_chunk),
      ring_k=_written(self.ring_k, new.k, to_ring),
      ring_v=_written(self.ring_v, new.v, to_ring),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInPlace:
  """One layer of a cache of all layers, which an op reads where it lies.

  Attributes:
    whole: the cache, with axis L.
    layer: its index, an int32 scalar.
    seen_from: (B, M) int32, of the layer.
    implementation: of `ops.chunked_attention_step`.
  """

  whole: ChunkedCache
  layer: jax.Array
  seen_from: jax.Array
  implementation: str

  def attend(
    self,
    q: jax.Array,
    new: NewTokens,
    slots: jax.Array,
    top: int | None = None,
  ) -> jax.Array:
    """As `ChunkedCache.attend`, of one new token a row and all chunks.

    Raises:
      InputError: tokens are more, or the best chunks are asked for.
    """
    if q.shape[1] != 1 or top is not None:
      raise InputError(
        f"step={self.implementation}: the step reads one token a row and all "
        f"chunks, not {q.shape[1]} tokens and top_chunks={top or 0}: take xla"
      )
    whole, slot = self.whole, slots[:, 0]
    both = lambda k, v: (k, k if v is None else v)
    # Chunks come in sight in the order in which they lie.
    chunks = jnp.sum(self.seen_from <= slots, axis=1, dtype=jnp.int32)
    mixed = chunked_attention_step(
      q[:, 0],
      *(x[:, 0] for x in both(new.k, new.v)),
      *both(whole.chunk_k, whole.chunk_v),
      *both(whole.ring_k, whole.ring_v),
      self.layer,
      chunks,
      jnp.minimum(slot, whole.ring_k.shape[2]),
      implementation=self.implementation,
    )
    return mixed[:, None]


def _best(q, keys, masks, parts, top):
  """The masks (B, N, 1, T, S) of `parts`, of the keys with the best scores.

  Heads of a key choose together, by the sum of their scores, as
  `ops.chunked_attention` has it.
  """
  heads = keys[0].shape[2]
  q = q.reshape(*q.shape[:2], heads, -1, q.shape[3])
  totals = [
    jnp.where(
      masks[i][:, None],
      jnp.einsum(
        "btngk,bsnk->bngts", q, keys[i], preferred_element_type=jnp.float32
      ).sum(axis=2),
      -jnp.inf,
    )
    for i in parts
  ]
  total = jnp.concatenate(totals, axis=-1)
  counts = jnp.full(total.shape[:-1], top, jnp.int32)
  chosen = top_mask(total, counts) & (total > -jnp.inf)
  ends = list(itertools.accumulate(x.shape[-1] for x in totals))[:-1]
  return [part[:, :, None] for part in jnp.split(chosen, ends, axis=-1)]


def _written(whole, part, to):
  """`whole` (L, B, S, ...) with `part` (L, B, T, ...) at `to` (L, B, T)."""
  if whole is None:
    return None
  layers = jnp.arange(whole.shape[0])[:, None, None]
  rows = jnp.arange(whole.shape[1])[None, :, None]
  return whole.at[layers, rows, to].set(part, mode="drop")
