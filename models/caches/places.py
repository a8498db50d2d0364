"""Where the tokens of a call go in the rows of a cache, and what they see.

Shapes by axis letter: B batch, T new tokens, S cache slots.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ops import segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
  """The places of new tokens; a slot is also the position of its token.

  Attributes:
    filled: (B,) int32, slots that earlier tokens have filled.
    slots: (B, T) int32. Padding has that of the token before it.
    starts: (B, T) int32, slot at which each token's text begins; None where
      every token sees its whole row.
    padding: (B, T) bool, tokens that are not kept; None for none.
  """

  filled: jax.Array
  slots: jax.Array
  starts: jax.Array | None = None
  padding: jax.Array | None = None

  @classmethod
  def after(
    cls, filled: jax.Array, count: int, start: jax.Array | None = None
  ) -> "Places":
    """Places of `count` tokens of each row's last text.

    Args:
      filled: (B,) int32.
      count: T.
      start: (B,) int32, slot at which the row's last text begins.
    """
    slots = filled[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    if start is not None:
      start = jnp.broadcast_to(start[:, None], slots.shape)
    return cls(filled=filled, slots=slots, starts=start)

  @classmethod
  def of_segments(
    cls, filled: jax.Array, start: jax.Array, segment_ids: jax.Array
  ) -> "Places":
    """Places of packed or padded tokens.

    A row's first text goes on from its last one in the cache.

    Args:
      filled: (B,) int32.
      start: (B,) int32, slot at which the row's last text begins.
      segment_ids: (B, T) int32 as `ops.segments` defines them.
    """
    padding = segments.is_padding(segment_ids)
    counted = jnp.cumsum(~padding, axis=1, dtype=jnp.int32)
    slots = filled[:, None] + counted - 1
    starts = jnp.where(segments.resets(segment_ids), slots, start[:, None])
    starts = jax.lax.cummax(starts, axis=1)
    return cls(filled=filled, slots=slots, starts=starts, padding=padding)

  @property
  def length(self) -> jax.Array:
    """(B,) int32, slots that are filled once the tokens are kept."""
    return self.slots[:, -1] + 1

  def sees_old(self, size: int) -> jax.Array:
    """Which of S = `size` slots each token sees: (B, T or 1, S) bool."""
    slots = jnp.arange(size, dtype=jnp.int32)[None, None]
    seen = slots < self.filled[:, None, None]
    return seen if self.starts is None else seen & (slots >= self._starts())

  def sees_new(self) -> jax.Array:
    """Which new tokens each new token sees: (B or 1, T, T) bool."""
    if self.starts is None:
      steps = jnp.arange(self.slots.shape[1])
      return steps[None, None] <= steps[None, :, None]
    others = self.slots[:, None]
    seen = (others <= self.slots[..., None]) & (others >= self._starts())
    return seen if self.padding is None else seen & ~self.padding[:, None]

  def to(self, size: int) -> jax.Array:
    """Slots (B, T) to write to; beyond `size` for what is not kept."""
    if self.padding is None:
      return self.slots
    return jnp.where(self.padding, size, self.slots)

  def _starts(self):
    return self.starts[..., None]
