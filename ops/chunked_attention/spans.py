"""Which tiles of chunk keys a tile of queries meets, for all kernels."""

import jax
import jax.numpy as jnp
from jax import lax


def bounds(
  seen_from: jax.Array,
  ends: jax.Array,
  starts: jax.Array | None,
  queries: int,
  keys: int,
  length: int,
) -> tuple[jax.Array, jax.Array]:
  """Which tiles of chunk keys a tile of queries sees, and which of them whole.

  Args:
    seen_from: (B, M), M a multiple of `keys`.
    ends: (B, M).
    starts: (B, S) or None.
    queries: Of a tile.
    keys: Of a tile.
    length: S, a multiple of `queries`.

  Returns:
    (seen, whole), both (B, query tiles, key tiles) bool.
  """
  tiled = lambda x, size: x.reshape(x.shape[0], -1, size)
  first = queries * jnp.arange(length // queries, dtype=jnp.int32)
  first = first[None, :, None]
  of = tiled(seen_from, keys)
  seen = of.min(axis=2)[:, None] < first + queries
  whole = of.max(axis=2)[:, None] <= first
  if starts is not None:
    own, last = tiled(starts, queries), tiled(ends, keys)
    seen &= own.min(axis=2)[:, :, None] <= last.max(axis=2)[:, None]
    whole &= own.max(axis=2)[:, :, None] <= last.min(axis=2)[:, None]
  return seen, whole


def spans(seen: jax.Array, whole: jax.Array, masked_first: bool) -> jax.Array:
  """The walk along the last axis as (..., 4) int32: begin, whole from, to, end.

  Tiles outside of [begin, end) are not seen, those of [from, to) need no mask.

  Args:
    seen: (..., T) bool.
    whole: (..., T) bool.
    masked_first: Whether those that need a mask may come first; else the ones
      that need none begin at once, or there are none.
  """
  count = seen.shape[-1]
  places = lax.broadcasted_iota(jnp.int32, seen.shape, seen.ndim - 1)
  first = lambda mask: jnp.min(jnp.where(mask, places, count), axis=-1)
  end = jnp.max(jnp.where(seen, places + 1, 0), axis=-1)
  begin = start = jnp.minimum(first(seen), end)
  if masked_first:
    start = jnp.clip(first(whole), begin, end)
  stop = first(~whole & (places >= start[..., None]))
  return jnp.stack([begin, start, jnp.clip(stop, start, end), end], axis=-1)
