"""One decoder for Llama-3.x, SmolLM2, Qwen2.5 and Qwen3.

Grouped-query attention, rotary positions, RMSNorm, SwiGLU, tied or untied
head. Layers are stacked and scanned, so compile time does not grow with
depth. Shapes by axis letter: B batch, T tokens, S cache slots, L layers,
D width, H query heads, N key/value heads, K head dimension, V vocabulary.

How attention reads its keys is an argument (`attend`), and so are hooks
around the MLP: methods that change what a token computes (`research/sol`)
run this very module instead of a copy.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers, module
from models.transformer_config import TransformerConfig

Params = module.Params
# (q (..., H, K), k (..., N, K), v, layer_input) -> (out (..., H, K), output)
Attend = Callable[..., tuple[jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
  """Keys and values of all layers, and how many slots each row has filled.

  Attributes:
    k: (L, B, S, N, K), rotated keys.
    v: (L, B, S, N, K).
    length: (B,) int32, filled slots; the next token of row b takes position
      and slot `length[b]`.
  """

  k: jax.Array
  v: jax.Array
  length: jax.Array


class Attention(nnx.Module):
  """Grouped-query attention: project, let `attend` mix, project back."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    """Builds the four projections and, for Qwen3, the q/k norms."""
    c = config
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    linear = functools.partial(layers.Linear, rngs=rngs)
    self.config = c
    self.q_proj = linear(c.d_model, q_size, use_bias=c.qkv_bias)
    self.k_proj = linear(c.d_model, kv_size, use_bias=c.qkv_bias)
    self.v_proj = linear(c.d_model, kv_size, use_bias=c.qkv_bias)
    self.o_proj = linear(q_size, c.d_model)
    norm = functools.partial(layers.RMSNorm, c.head_dim, eps=c.norm_eps)
    self.q_norm = norm() if c.qk_norm else None
    self.k_norm = norm() if c.qk_norm else None

  def __call__(
    self, x: jax.Array, positions: jax.Array, attend: Attend, layer_input: Any
  ) -> tuple[jax.Array, Any]:
    """Maps (..., D) at `positions` (...); passes `attend`'s output on."""
    c = self.config
    q, k, v = (
      y.reshape(*x.shape[:-1], -1, c.head_dim)
      for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
    )
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    frequencies = layers.rope_frequencies(
      c.head_dim, c.rope_theta, c.rope_scaling
    )
    q = layers.apply_rope(q, positions, frequencies)
    k = layers.apply_rope(k, positions, frequencies)
    mixed, layer_output = attend(q, k, v, layer_input)
    return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), layer_output


class Block(nnx.Module):
  """Pre-norm residual block."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    """Builds attention, MLP and their norms."""
    self.attn_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.attn = Attention(config, rngs=rngs)
    self.mlp_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.mlp = layers.GatedMlp(config.d_model, config.d_ff, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    attend: Attend,
    layer_input: Any,
    hooks: layers.MlpHooks,
  ) -> tuple[jax.Array, Any]:
    """Maps (..., D); the second result is `attend`'s output."""
    mixed, layer_output = self.attn(
      self.attn_norm(x), positions, attend, layer_input
    )
    x = x + mixed
    return x + self.mlp(self.mlp_norm(x), hooks), layer_output


class Transformer(module.TokenModel):
  """The decoder: embed, scan the blocks, norm, head."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    """Random weights; `bind` puts converted ones in their place."""
    self.config = config
    self.embed = layers.Embedding(
      config.padded_vocab_size, config.d_model, rngs=rngs
    )
    keys = jax.random.split(rngs.params(), config.num_layers)
    self.layers = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
    self.final_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.lm_head = (
      None
      if config.tie_embeddings
      else layers.Linear(config.d_model, config.padded_vocab_size, rngs=rngs)
    )

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    attend: Attend,
    *,
    layer_inputs: Any = None,
    hooks: layers.MlpHooks | None = None,
    remat: bool = False,
    unroll: int = 1,
  ) -> tuple[jax.Array, Any]:
    """Runs all layers and the final norm.

    Args:
      x: (..., D) embedded tokens.
      positions: (...) int32.
      attend: mixes one layer's heads.
      layer_inputs: pytree with leading axis L; slice l goes to `attend`.
      hooks: inside every MLP.
      remat: keep only each layer's input for the backward pass, and compute
        the layer a second time there.
      unroll: layers laid out flat in one iteration of the scan. A scan copies
        what a layer keeps for the backward pass, and its weights for a product;
        of as many as there are layers no scan is left, and they compile longer.

    Returns:
      Hidden states (..., D) and `attend`'s outputs stacked over L.
    """
    hooks = hooks or layers.MlpHooks()

    def layer(x, block_and_input):
      block, layer_input = block_and_input
      return block(x, positions, attend, layer_input, hooks)

    if remat:
      layer = jax.checkpoint(layer, prevent_cse=False)
    x, layer_outputs = jax.lax.scan(
      layer, x, (self.layers, layer_inputs), unroll=unroll
    )
    return self.final_norm(x), layer_outputs


init, bind = Transformer.init, Transformer.bind
abstract_params, num_params = (
  Transformer.abstract_params,
  Transformer.num_params,
)


def causal_attend(
  implementation: str | None = None,
  segment_ids: jax.Array | None = None,
  *,
  keep: bool = True,
) -> Attend:
  """Causal attention among the tokens of one call; outputs their (k, v).

  Args:
    implementation: of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
    segment_ids: (B, T) int32; tokens of other segments are not seen.
    keep: output (k, v); training has no use for them.
  """
  mask = None
  if segment_ids is not None:
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]

  def attend(q, k, v, _):
    mixed = jax.nn.dot_product_attention(
      q, k, v, mask=mask, is_causal=True, implementation=implementation
    )
    return mixed, (k, v) if keep else None

  return attend


def forward(
  config: TransformerConfig,
  params: Params,
  tokens: jax.Array,
  *,
  attention: str | None = None,
) -> jax.Array:
  """Float32 logits (B, T, V) of `tokens` (B, T) in one causal pass."""
  model = bind(config, params)
  hidden, _ = model(
    model.embed(tokens), token_positions(tokens), causal_attend(attention)
  )
  return model.logits(hidden)


def token_positions(tokens: jax.Array) -> jax.Array:
  """Positions 0..T-1 for every row of (B, T)."""
  steps = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
  return jnp.broadcast_to(steps[None], tokens.shape)


def prefill(
  config: TransformerConfig,
  params: Params,
  tokens: jax.Array,
  *,
  cache_size: int,
  attention: str | None = None,
) -> tuple[jax.Array, KVCache]:
  """Reads `tokens` (B, T) into a new cache of `cache_size` slots.

  Returns:
    Hidden states (B, T, D) after the final norm (`Transformer.logits` maps
    those that are wanted), and the cache.

  Raises:
    ValueError: the tokens do not fit into the cache.
  """
  batch, length = tokens.shape
  if length > cache_size:
    raise ValueError(f"{length} tokens do not fit into {cache_size} slots")
  model = bind(config, params)
  hidden, (k, v) = model(
    model.embed(tokens), token_positions(tokens), causal_attend(attention)
  )
  padding = ((0, 0), (0, 0), (0, cache_size - length), (0, 0), (0, 0))
  return hidden, KVCache(
    k=jnp.pad(k, padding),
    v=jnp.pad(v, padding),
    length=jnp.full((batch,), length, jnp.int32),
  )


def decode(
  config: TransformerConfig,
  params: Params,
  tokens: jax.Array,
  cache: KVCache,
) -> tuple[jax.Array, KVCache]:
  """Appends `tokens` (B, T), one or several, to the cache.

  Rows may differ in length. The caller keeps `length + T` within the cache;
  slots past its end would be dropped.

  Returns:
    Float32 logits (B, T, V) and the longer cache.
  """
  model = bind(config, params)
  steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
  positions = cache.length[:, None] + steps[None]
  slots = jnp.arange(cache.k.shape[2], dtype=jnp.int32)
  old = slots[None] < cache.length[:, None]
  masks = old[:, None], steps[None, None] <= steps[None, :, None]

  def attend(q, k, v, layer_cache):
    return _attend_in_parts(q, zip(layer_cache, (k, v)), masks), (k, v)

  # Layers read the old cache and give their new keys and values, so that all
  # are written at once, in the place of the cache where it is donated.
  hidden, new = model(
    model.embed(tokens), positions, attend, layer_inputs=(cache.k, cache.v)
  )
  rows = jnp.arange(tokens.shape[0])[:, None]
  k, v = (
    whole.at[:, rows, positions].set(part, mode="drop")
    for whole, part in zip((cache.k, cache.v), new)
  )
  length = cache.length + tokens.shape[1]
  return model.logits(hidden), KVCache(k=k, v=v, length=length)


def _attend_in_parts(q, keys_and_values, masks) -> jax.Array:
  """Attention to keys and values that lie in several arrays.

  Args:
    q: (B, T, H, K).
    keys_and_values: the parts of the keys and those of the values, (B, S, N, K)
      each.
    masks: of the parts, (B or 1, T or 1, S) each, True where a key is seen.

  Returns:
    (B, T, H, K).
  """
  keys, values = keys_and_values
  batch, length, _, size = q.shape
  q = q.reshape(batch, length, keys[0].shape[2], -1, size)
  scores = [
    jnp.where(
      mask[:, None, None],
      jnp.einsum("btngk,bsnk->bngts", q, k, preferred_element_type=jnp.float32),
      -jnp.inf,
    )
    for k, mask in zip(keys, masks, strict=True)
  ]
  shares = jax.nn.softmax(size**-0.5 * jnp.concatenate(scores, -1), axis=-1)
  shares = jnp.split(
    shares.astype(values[0].dtype), [keys[0].shape[1]], axis=-1
  )
  mixed = sum(
    jnp.einsum("bngts,bsnk->btngk", share, v)
    for share, v in zip(shares, values, strict=True)
  )
  return mixed.reshape(batch, length, -1, size)
