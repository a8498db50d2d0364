"""The encoders of T5Gemma and T5Gemma-2, with the arithmetic of the release.

T5Gemma (arXiv:2504.06225) is Gemma 2 that sees both sides: embeddings times
sqrt(D), norms in front of and behind attention and MLP that scale by 1 + w, a
gated MLP with tanh-GELU, a soft cap on the scores, and layers that see the
neighbours alone between those that see all. T5Gemma-2 has the form of Gemma 3:
no cap, but normed queries and keys, and two bases of rotations. Texts only: the
vision tower is left out.

Shapes by axis letter: B batch, L text tokens, D width, H query heads, N
key/value heads, K head dimension.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import layers, module, placement
from models.t5gemma_config import T5GemmaConfig

Params = module.Params
# Scores are held in memory for so many queries at a time.
_QUERIES = 512
# The mask is finite, so that a row of padding that sees nothing is no NaN.
_UNSEEN = -1e30


class Norm(nnx.Module):
  """RMS norm that scales by 1 + weight, all in float32."""

  def __init__(self, features: int, *, eps: float):
    """Zero weight."""
    self.eps = eps
    self.weight = nnx.Param(jnp.zeros((features,)))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., D), and gives the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    scale = (1.0 + self.weight[...].astype(jnp.float32)).reshape(
      (1,) * (x.ndim - 1) + (-1,)
    )
    return (x32 * jax.lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query attention to both sides."""

  def __init__(self, config: T5GemmaConfig, *, rngs: nnx.Rngs):
    """Builds the four projections and, for T5Gemma-2, the q/k norms."""
    c = self.config = config
    linear = functools.partial(layers.Linear, rngs=rngs)
    self.q_proj = linear(c.d_model, c.num_heads * c.head_dim)
    self.k_proj = linear(c.d_model, c.num_kv_heads * c.head_dim)
    self.v_proj = linear(c.d_model, c.num_kv_heads * c.head_dim)
    self.o_proj = linear(c.num_heads * c.head_dim, c.d_model)
    norm = functools.partial(Norm, c.head_dim, eps=c.norm_eps)
    self.q_norm = norm() if c.qk_norm else None
    self.k_norm = norm() if c.qk_norm else None

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    is_sliding: jax.Array,
    frequencies: jax.Array,
  ) -> jax.Array:
    """Maps (B, L, D), given `mask` (B, L) and what differs between layers."""
    c = self.config
    q, k, v = (
      y.reshape(*x.shape[:2], -1, c.head_dim)
      for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
    )
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    q, k = (layers.apply_rope(y, positions, frequencies) for y in (q, k))
    mixed = _attend(c, q, k, v, mask, is_sliding)
    return self.o_proj(mixed.reshape(*x.shape[:2], -1))


def _attend(c: T5GemmaConfig, q, k, v, mask, is_sliding) -> jax.Array:
  """(B, L, H, K): as many queries at a time as memory is meant for."""
  length = q.shape[1]
  part = min(length, _QUERIES)
  count = -(-length // part)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def some(start_and_queries):
    start, q = start_and_queries
    q = q.reshape(*q.shape[:2], c.num_kv_heads, -1, c.head_dim)
    scores = jnp.einsum(
      "btngk,bsnk->bngts", q, k, preferred_element_type=jnp.float32
    )
    scores = scores * c.query_scalar**-0.5
    if c.softcap is not None:
      scores = c.softcap * jnp.tanh(scores / c.softcap)
    ahead = jnp.arange(length)[None] - (start + jnp.arange(part))[:, None]
    near = (ahead >= -c.behind) & (ahead <= c.ahead)
    seen = mask[:, None] & (near | ~is_sliding)[None]
    shares = jax.nn.softmax(
      jnp.where(seen[:, None, None], scores, _UNSEEN), axis=-1
    )
    mixed = jnp.einsum("bngts,bsnk->btngk", shares.astype(v.dtype), v)
    return mixed.reshape(*mixed.shape[:2], -1, c.head_dim)

  if count == 1:
    return some((jnp.int32(0), q))
  padded = jnp.pad(q, ((0, 0), (0, count * part - length), (0, 0), (0, 0)))
  parts = jnp.stack(jnp.split(padded, count, axis=1))
  mixed = jax.lax.map(some, (part * jnp.arange(count), parts))
  return jnp.concatenate(list(mixed), axis=1)[:, :length]


class Block(nnx.Module):
  """Attention and MLP, each with a norm in front and one behind."""

  def __init__(self, config: T5GemmaConfig, *, rngs: nnx.Rngs):
    """Builds both parts and the four norms."""
    norm = functools.partial(Norm, config.d_model, eps=config.norm_eps)
    self.pre_attn_norm, self.post_attn_norm = norm(), norm()
    self.attn = Attention(config, rngs=rngs)
    self.pre_mlp_norm, self.post_mlp_norm = norm(), norm()
    self.mlp = layers.GatedMlp(
      config.d_model, config.d_ff, activation="gelu", rngs=rngs
    )


class Encoder(module.Model):
  """Token table, stacked layers, last norm."""

  def __init__(self, config: T5GemmaConfig, *, rngs: nnx.Rngs):
    """Random weights; `models.convert.t5gemma` reads those of a release."""
    self.config = config
    self.embed = layers.Embedding(config.vocab_size, config.d_model, rngs=rngs)
    keys = jax.random.split(rngs.params(), config.num_layers)
    self.layers = jax.vmap(
      lambda key: Block(config, rngs=nnx.Rngs(params=key))
    )(keys)
    self.norm = Norm(config.d_model, eps=config.norm_eps)

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    dtype: str = "float32",
    remat: bool = False,
    keys: jax.Array | None = None,
    droppers: Callable[[Any], tuple[Callable, Callable | None]] | None = None,
  ) -> jax.Array:
    """Hidden states (B, L, D) of tokens; those of padding say nothing.

    Args:
      tokens: (B, L) int32.
      mask: (B, L) bool, False where there is padding.
      dtype: of activations.
      remat: compute every layer again in the backward pass, to save memory.
      keys: one a layer, for `droppers`.
      droppers: from a key the functions for what attention and what the MLP
        add; None drops nothing.
    """
    c = self.config
    x = self.embed(tokens).astype(dtype)
    x = x * jnp.asarray(math.sqrt(c.d_model), x.dtype)

    def layer(x, block, is_sliding, frequencies, key):
      drop_mixed, drop_mlp = droppers(key) if droppers else (None, None)
      mixed = block.attn(block.pre_attn_norm(x), mask, is_sliding, frequencies)
      mixed = block.post_attn_norm(mixed)
      x = x + (drop_mixed(mixed) if drop_mixed else mixed)
      y = block.post_mlp_norm(block.mlp(block.pre_mlp_norm(x)))
      return placement.rows(x + (drop_mlp(y) if drop_mlp else y)), None

    layer = placement.layer(layer, dtype=dtype, remat=remat)
    inputs = (self.layers, jnp.asarray(c.sliding), _frequencies(c), keys)
    x, _ = jax.lax.scan(lambda x, each: layer(x, *each), x, inputs)
    return self.norm(x)


def _frequencies(c: T5GemmaConfig) -> jax.Array:
  """(layers, K / 2) radians a token."""
  whole = layers.rope_frequencies(
    c.head_dim, c.rope_theta, factor=c.rope_factor
  )
  near = layers.rope_frequencies(c.head_dim, c.sliding_rope_theta)
  return jnp.asarray(np.where(np.array(c.sliding)[:, None], near, whole))


abstract_params = Encoder.abstract_params
