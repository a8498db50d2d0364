"""Weighted means of chunks, whole or token by token.

Shapes by axis letter: `...` any leading axes, B batch, S tokens, M chunks, F
channels, G channels of the weights: F or 1.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

# Finite, so that a chunk without tokens is no NaN.
_NOTHING = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """Sums over tokens, each weighted by exp(gate - peak); float32.

  Attributes:
    peak: (..., G), the largest gate.
    total: (..., G), sum of the weights.
    k: (..., F), sum of the weighted keys.
    v: (..., F), of the values; None where there are none.
  """

  peak: jax.Array
  total: jax.Array
  k: jax.Array
  v: jax.Array | None

  @classmethod
  def empty(cls, shape: tuple[int, ...], gates: int, *, values: bool) -> Self:
    """Of no token.

    Args:
      shape: (..., F).
      gates: G.
      values: whether there are values.
    """
    own = (*shape[:-1], gates)
    return cls(
      peak=jnp.full(own, _NOTHING, jnp.float32),
      total=jnp.zeros(own, jnp.float32),
      k=jnp.zeros(shape, jnp.float32),
      v=jnp.zeros(shape, jnp.float32) if values else None,
    )

  @classmethod
  def of_token(cls, k: jax.Array, v: jax.Array | None, gate: jax.Array) -> Self:
    """Of one token: keys and values (..., F), gates (..., G)."""
    f32 = lambda x: None if x is None else x.astype(jnp.float32)
    gate = f32(gate)
    return cls(peak=gate, total=jnp.ones_like(gate), k=f32(k), v=f32(v))

  def merge(self, other: "Pool") -> "Pool":
    """Of the tokens of both."""
    peak = jnp.maximum(self.peak, other.peak)
    ours, theirs = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
    add = lambda x, y: None if x is None else ours * x + theirs * y
    return Pool(
      peak=peak,
      total=add(self.total, other.total),
      k=add(self.k, other.k),
      v=add(self.v, other.v),
    )

  def where(self, mask: jax.Array, other: "Pool") -> "Pool":
    """This one where `mask` (...), else the other."""
    return jax.tree.map(
      lambda x, y: jnp.where(mask[..., None], x, y), self, other
    )

  def mean(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Mean keys and values (..., F); zero of no token."""
    total = jnp.where(self.total > 0, self.total, 1)
    cast = lambda x: None if x is None else (x / total).astype(dtype)
    return cast(self.k), cast(self.v)


def pool(
  k: jax.Array,
  v: jax.Array | None,
  gates: jax.Array,
  first: jax.Array,
  last: jax.Array,
  width: int,
) -> Pool:
  """Pools of the tokens from `first` to `last`.

  Args:
    k: (B, S, F).
    v: (B, S, F), or None.
    gates: (B, S, G).
    first: (B, M) int32 slots.
    last: (B, M) int32 slots; in front of the first where there is no token.
    width: tokens of a pool at most.

  Returns:
    (B, M, F) and (B, M, G).
  """
  slots = last[..., None] - jnp.arange(width, dtype=jnp.int32)[None, None]
  inside = (slots >= first[..., None]) & (slots >= 0) & (slots < k.shape[1])
  at = jnp.clip(slots, 0, k.shape[1] - 1)
  take = lambda x: jnp.take_along_axis(
    x[:, None].astype(jnp.float32), at[..., None], axis=2, mode="clip"
  )
  gates = jnp.where(inside[..., None], take(gates), _NOTHING)
  peak = jax.lax.stop_gradient(jnp.max(gates, axis=2))
  shares = jnp.where(inside[..., None], jnp.exp(gates - peak[:, :, None]), 0)
  add = lambda x: None if x is None else jnp.sum(shares * take(x), axis=2)
  return Pool(peak=peak, total=jnp.sum(shares, axis=2), k=add(k), v=add(v))
