"""Every key and value, in slots of their own.

Shapes by axis letter: L layers, B batch, T new tokens, S cache slots, H query
heads, N key/value heads, K head dimension.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp

from models.attention import Attend
from models.caches.places import Places
from ops.quantized import QTensor, Taps, as_array, rounded

# Finite, so that padding that sees nothing is no NaN.
_UNSEEN = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCache:
  """Keys and values of L layers; one layer's has no axis L.

  Each is an array, or a `QTensor` of that shape and axis -1, whose new tokens
  come rounded in the same format.

  Attributes:
    k: (L, B, S, N, K), rotated keys.
    v: (L, B, S, N, K).
  """

  k: jax.Array | QTensor
  v: jax.Array | QTensor

  @classmethod
  def empty(
    cls, shape: Sequence[int], dtype: jnp.dtype, taps: Taps | None = None
  ) -> Self:
    """A cache of `shape` (L, B, S, N, K) that holds nothing.

    Args:
      shape: of keys and of values.
      dtype: of the passes.
      taps: that round keys and values, whose scales are each token's own.
    """
    taps = taps or Taps()

    def zeros(by):
      like = jax.ShapeDtypeStruct(tuple(shape), dtype)
      like = jax.eval_shape(lambda x: rounded(x, by), like)
      # A scale that is a power of two is never zero, and zeros in its dtype are
      # no numbers: so it begins as that of a value of zero.
      one = rounded(jnp.zeros((1, 1, 1, 1, shape[-1]), dtype), by)
      fill = lambda leaf, value: jnp.broadcast_to(value, leaf.shape)
      return jax.tree.map(fill, like, one)

    # Two arrays: a buffer that is donated must not be there twice.
    return cls(k=zeros(taps.k), v=zeros(taps.v))

  @property
  def dtype(self) -> jnp.dtype:
    """Of the passes that read it."""
    return self.k.dtype

  def layer_inputs(self) -> "DenseCache":
    """What `attend` is given of all layers: the cache, with axis L in front."""
    return self

  def filled(
    self, new: tuple[jax.Array, jax.Array], lengths: jax.Array | None = None
  ) -> "DenseCache":
    """The cache behind texts that it has read from slot 0 on.

    Args:
      new: keys and values (L, B, T, N, K).
      lengths: (B,) int32, tokens of each row. The slots of others are written
        over before a mask lets them be seen.
    """
    del lengths
    write = lambda whole, part: whole.at[:, :, : part.shape[2]].set(part)
    k, v = jax.tree.map(write, (self.k, self.v), new)
    return DenseCache(k=k, v=v)

  def attend(self, places: Places) -> Attend:
    """Attention of new tokens to the old ones of a layer and to each other.

    The function takes q (B, T, H, K), new k and v (B, T, N, K) and one layer of
    this cache. It gives the mixed heads, and (k, v) for `append`.
    """
    masks = places.sees_old(self.k.shape[2]), places.sees_new()

    def attend(q, k, v, layer_cache):
      keys, values = (layer_cache.k, k), (layer_cache.v, v)
      mixed = attend_in_parts(q, keys, values, masks)
      # The old keys are read before new ones are written: XLA would else keep
      # them by copying the cache.
      return jax.lax.optimization_barrier((mixed, (k, v)))

    return attend

  def append(
    self, new: tuple[jax.Array, jax.Array], places: Places
  ) -> "DenseCache":
    """Writes the new tokens of all layers; past the end they are dropped.

    Args:
      new: keys and values (L, B, T, N, K).
      places: of the tokens.
    """
    rows = jnp.arange(places.slots.shape[0])[:, None]
    to = places.to(self.k.shape[2])
    write = lambda whole, part: whole.at[:, rows, to].set(part, mode="drop")
    k, v = jax.tree.map(write, (self.k, self.v), new)
    return DenseCache(k=k, v=v)


def attend_in_parts(q, keys, values, masks) -> jax.Array:
  """Attention to keys and values that lie in several arrays.

  Args:
    q: (B, T, H, K).
    keys: the parts of the keys, (B, S, N, K) each, arrays or QTensors.
    values: those of the values.
    masks: of the parts, (B or 1, T or 1, S) each, True where a key is seen; or
      (B, N, 1, T, S) where that depends on the head.

  Returns:
    (B, T, H, K).
  """
  keys, values = ([as_array(one) for one in some] for some in (keys, values))
  batch, length, _, size = q.shape
  q = q.reshape(batch, length, keys[0].shape[2], -1, size)
  scores = [
    jnp.where(
      mask if mask.ndim == 5 else mask[:, None, None],
      jnp.einsum("btngk,bsnk->bngts", q, k, preferred_element_type=jnp.float32),
      _UNSEEN,
    )
    for k, mask in zip(keys, masks, strict=True)
  ]
  shares = jax.nn.softmax(size**-0.5 * jnp.concatenate(scores, -1), axis=-1)
  ends = list(itertools.accumulate(part.shape[1] for part in keys))[:-1]
  shares = jnp.split(shares.astype(values[0].dtype), ends, axis=-1)
  mixed = sum(
    jnp.einsum("bngts,bsnk->btngk", share, v)
    for share, v in zip(shares, values, strict=True)
  )
  return mixed.reshape(batch, length, -1, size)
