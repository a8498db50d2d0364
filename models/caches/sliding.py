"""Keys and values of layers of which some see the nearest tokens alone.

Layers that see all have a slot for every token, and sliding ones a ring of as
many as a token sees, and some more. Shapes by axis letter: L layers, B batch,
T new tokens, S cache slots, R ring slots, H query heads, N key/value heads, K
head dimension.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from models.attention import Attend
from models.caches.dense import DenseCache, attend_in_parts
from models.caches.places import Places
from ops.quantized import Taps

# Tokens that may be taken back: their keys have been written over the oldest of
# the ring, which the tokens before them still see.
SPARE = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingCache:
  """A `DenseCache` for each of the two kinds of layers.

  The state's `length` may be set back by up to `SPARE` tokens.

  Attributes:
    whole: (L0, B, S, N, K), of the layers that see all.
    ring: (L1, B, R, N, K) of the last R tokens of sliding layers; that at
      position p is in slot p % R.
    sliding: for each of the L0 + L1 layers whether it slides.
    behind: how many tokens in front of it a token sees there.
  """

  whole: DenseCache
  ring: DenseCache
  sliding: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
  behind: int = dataclasses.field(metadata={"static": True})

  @classmethod
  def empty(
    cls,
    shape: tuple[int, int, int, int],
    dtype: jnp.dtype,
    taps: Taps | None = None,
    *,
    sliding: tuple[bool, ...],
    behind: int,
  ) -> Self:
    """A cache that holds nothing.

    Args:
      shape: (B, S, N, K).
      dtype: of the passes.
      taps: that round keys and values.
      sliding: for each layer whether it slides.
      behind: how many tokens in front of it a token sees there.
    """
    batch, size, *heads = shape
    slots = min(behind + 1 + SPARE, size)
    counts = len(sliding) - sum(sliding), sum(sliding)
    whole, ring = (
      DenseCache.empty((count, batch, some, *heads), dtype, taps)
      for count, some in zip(counts, (size, slots), strict=True)
    )
    return cls(whole=whole, ring=ring, sliding=sliding, behind=behind)

  @property
  def dtype(self) -> jnp.dtype:
    """Of the passes that read it."""
    return self.whole.dtype

  def layer_inputs(self) -> tuple[jax.Array, jax.Array]:
    """What `attend` is told of each layer: (L,) whether it slides, its place.

    The place is that among the layers of its kind.
    """
    sliding = np.array(self.sliding)
    place = np.where(sliding, np.cumsum(sliding), np.cumsum(~sliding)) - 1
    return jnp.asarray(sliding), jnp.asarray(place, jnp.int32)

  def attend(self, places: Places) -> Attend:
    """Attention of new tokens to the old ones of a layer and to each other.

    The function takes q (B, T, H, K), new k and v (B, T, N, K), and what
    `layer_inputs` has of the layer. It gives the mixed heads, and (k, v) for
    `append`.
    """
    at = places.slots
    new = places.sees_new()
    near = new & (at[:, :, None] - at[:, None] <= self.behind)
    old = places.sees_old(self.whole.k.shape[2])
    in_ring = self._sees_ring(places)

    def some(cache, masks):
      def run(q, k, v, place):
        own = jax.tree.map(
          lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False),
          cache,
        )
        return attend_in_parts(q, (own.k, k), (own.v, v), masks)

      return run

    slides = some(self.ring, (in_ring, near))
    sees_all = some(self.whole, (old, new))

    def attend(q, k, v, layer_input, behind=None):
      del behind  # It is that of the cache.
      is_sliding, place = layer_input
      if all(self.sliding):
        mixed = slides(q, k, v, place)
      else:
        mixed = jax.lax.cond(is_sliding, slides, sees_all, q, k, v, place)
      # The old keys are read before new ones are written: XLA would else keep
      # them by copying the cache.
      return jax.lax.optimization_barrier((mixed, (k, v)))

    return attend

  def append(
    self, new: tuple[jax.Array, jax.Array], places: Places
  ) -> "SlidingCache":
    """Writes the new tokens of all layers; past the end they are dropped.

    Args:
      new: keys and values (L, B, T, N, K).
      places: of the tokens.
    """
    whole, ring = self._by_kind(new)
    size = self.ring.k.shape[2]
    # Of more tokens than the ring has slots, the last stay.
    late = places.slots > places.slots[:, -1:] - size
    to = jnp.where(late, places.slots % size, size)
    if places.padding is not None:
      to = jnp.where(places.padding, size, to)
    rows = jnp.arange(to.shape[0])[:, None]
    write = lambda old, part: old.at[:, rows, to].set(part, mode="drop")
    k, v = jax.tree.map(write, (self.ring.k, self.ring.v), ring)
    return dataclasses.replace(
      self, whole=self.whole.append(whole, places), ring=DenseCache(k=k, v=v)
    )

  def filled(
    self, new: tuple[jax.Array, jax.Array], lengths: jax.Array
  ) -> "SlidingCache":
    """The cache behind texts that it has read from slot 0 on.

    Args:
      new: keys and values (L, B, T, N, K).
      lengths: (B,) int32, tokens of each row; the others are padding.
    """
    whole, ring = self._by_kind(new)
    position = _in_ring(self.ring.k.shape[2], lengths)
    index = jnp.clip(position, 0, new[0].shape[2] - 1)[None, :, :, None, None]
    take = lambda part: jnp.take_along_axis(part, index, axis=2)
    k, v = jax.tree.map(take, ring)
    return dataclasses.replace(
      self, whole=self.whole.filled(whole), ring=DenseCache(k=k, v=v)
    )

  def _by_kind(self, new):
    """Those of the layers that see all, and those of sliding ones."""
    sliding = np.array(self.sliding)
    take = lambda kind: jax.tree.map(lambda x: x[np.flatnonzero(kind)], new)
    return take(~sliding), take(sliding)

  def _sees_ring(self, places: Places) -> jax.Array:
    """Which ring slots each token sees: (B, T, R) bool."""
    position = _in_ring(self.ring.k.shape[2], places.filled)[:, None]
    least = places.slots - self.behind
    if places.starts is not None:
      least = jnp.maximum(least, places.starts)
    return (position >= 0) & (position >= least[:, :, None])


def _in_ring(size: int, filled: jax.Array) -> jax.Array:
  """Positions (B, R) of the tokens in R = `size` slots; below 0 for none."""
  last = filled[:, None] - 1
  return last - (last - jnp.arange(size, dtype=jnp.int32)[None]) % size
