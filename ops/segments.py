"""Packed and padded rows: where a sequence ends and the next one begins.

`segment_ids` is (B, L) int32. A negative id is padding: the token leaves a
state untouched and its output is 0. Any other token belongs to the same segment
as the last token before it that is not padding, if their ids are equal; else it
starts a segment, and the state is reset to zero in front of it. The first
segment of a row starts from the row's initial state. So padding may stand at
either end of a row or between segments.
"""

import jax
import jax.numpy as jnp
from jax import lax


def is_padding(segment_ids: jax.Array) -> jax.Array:
  """Returns where a token is padding, (B, L) bool, by ids (B, L)."""
  return segment_ids < 0


def resets(segment_ids: jax.Array) -> jax.Array:
  """Returns the tokens in front of which the state is reset, (B, L) bool.

  Args:
    segment_ids: (B, L) int32, negative for padding.

  Returns:
    True at the first token of every segment but the first of its row. Padding
    is never True.
  """
  slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  seen = jnp.where(is_padding(segment_ids), -1, slots[None, :])
  last = lax.cummax(seen, axis=1)
  before = jnp.pad(last[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
  previous = jnp.take_along_axis(
    segment_ids, jnp.maximum(before, 0), axis=1, mode="clip"
  )
  follows = (before >= 0) & ~is_padding(segment_ids)
  return follows & (previous != segment_ids)


def zero_padding(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Returns x, (B, L, ...), with zeros where a token is padding.

  What padding holds, NaN included, then reaches neither state nor gradient.
  """
  if segment_ids is None:
    return x
  mask = is_padding(segment_ids).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))
  return jnp.where(mask, jnp.zeros((), x.dtype), x)


def check(op: str, segment_ids: jax.Array | None, batch: int, length: int):
  """Raises ValueError, naming `op`, unless the ids are (B, L) integers."""
  if segment_ids is None:
    return
  if segment_ids.shape != (batch, length):
    raise ValueError(
      f"{op}: segment_ids are {segment_ids.shape}, not (B, L) ="
      f" {(batch, length)}"
    )
  if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(f"{op}: segment_ids are {segment_ids.dtype}, not int32")
