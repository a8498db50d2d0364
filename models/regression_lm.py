"""Regression language model: reads a text, writes numbers.

An encoder over the text, and a decoder that writes the tokens of
`models.numbers` with attention to it. Keys and values of the text are computed
once a text (`encode`), and any number of rows of targets reads them: in cross
attention, where target tokens do not see each other, rows stand along the axis
of queries and nothing is copied. Layers are stacked; those of the encoder are
scanned, and those of the decoder, which are few, laid out flat, so that no keys
are copied to be read.

Shapes by axis letter: B texts, L text tokens, S rows of targets a text, T
tokens of a row, C decoder layers, D width, H query heads, N key/value heads, K
head dimension, V target tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models import (
  bidirectional,
  layers,
  module,
  placement,
  t5gemma,
  transformer,
)
from models.attention import Attend, attend_to_text
from models.implementations import Implementations
from models.numbers import START
from models.regression_lm_config import T5GEMMA, RegressionLMConfig

Params = module.Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """What the decoder reads of the texts.

  Attributes:
    k: C arrays (B, L, N, K).
    v: C arrays (B, L, N, K).
    lengths: (B,) int32, tokens of each text; what is behind is padding.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  lengths: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """Keys and values of the target tokens that were read.

  Attributes:
    k: C arrays (B, S, T, N, K), rotated keys.
    v: C arrays (B, S, T, N, K).
    length: int32 scalar, tokens of every row.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  length: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
  """How a pass is computed.

  Attributes:
    dtype: of activations; norms, logits and sums are float32.
    attention: of attention to the text: "xla", "cudnn", or None for the best
      that runs here (`models.attention`); the encoder "t5gemma" has its own.
    mamba: implementations of the ops of "mamba2".
    remat: compute every layer again in the backward pass, to save memory.
    unroll: layers of the encoder in one iteration of its scan, which divides
      them; 0 for all. A scan copies what a layer keeps for the backward pass;
      without one, layers compile longer.
  """

  dtype: str = "float32"
  attention: str | None = None
  mamba: Implementations = Implementations()
  remat: bool = False
  unroll: int = 1


class CrossAttention(nnx.Module):
  """Target tokens attend to the text, without positions."""

  def __init__(self, config: RegressionLMConfig, *, rngs: nnx.Rngs):
    """Builds the four projections."""
    c = self.config = config
    linear = functools.partial(layers.Linear, rngs=rngs)
    self.q_proj = linear(c.d_model, c.num_heads * c.head_dim)
    self.k_proj = linear(c.text_width, c.num_kv_heads * c.head_dim)
    self.v_proj = linear(c.text_width, c.num_kv_heads * c.head_dim)
    self.o_proj = linear(c.num_heads * c.head_dim, c.d_model)

  def keys_and_values(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps (B, L, width of the text) to keys and values (B, L, N, K)."""
    shape = (*text.shape[:-1], self.config.num_kv_heads, self.config.head_dim)
    k, v = (proj(text).reshape(shape) for proj in (self.k_proj, self.v_proj))
    return k, v

  def __call__(
    self,
    x: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    implementation: str | None = None,
  ) -> jax.Array:
    """Maps (B, S, T, D), given one layer of a `Memory`."""
    q = self.q_proj(x).reshape(
      x.shape[0], -1, self.config.num_heads, self.config.head_dim
    )
    mixed = attend_to_text(q, k, v, lengths, implementation=implementation)
    return self.o_proj(mixed.reshape(*x.shape[:-1], -1))


class DecoderBlock(nnx.Module):
  """Pre-norm: attention to earlier tokens, to the text, gated MLP."""

  def __init__(self, config: RegressionLMConfig, *, rngs: nnx.Rngs):
    """Builds the three parts and their norms."""
    norm = functools.partial(
      layers.RMSNorm, config.d_model, eps=config.norm_eps
    )
    self.attn_norm = norm()
    self.attn = transformer.Attention(config.attention, rngs=rngs)
    self.cross_norm = norm()
    self.cross = CrossAttention(config, rngs=rngs)
    self.mlp_norm = norm()
    self.mlp = layers.GatedMlp(
      config.attention.d_model, config.attention.d_ff, rngs=rngs
    )


class RegressionLM(module.Model):
  """Embed and encode the text; embed and decode the targets."""

  def __init__(self, config: RegressionLMConfig, *, rngs: nnx.Rngs):
    """Random weights."""
    c = self.config = config
    table = functools.partial(layers.Embedding, std=c.embed_std, rngs=rngs)
    if c.encoder == T5GEMMA:
      # The decoder has a token table and a last norm of its own.
      self.embed = self.encoder_norm = None
      self.encoder = t5gemma.Encoder(c.t5gemma, rngs=rngs)
    else:
      self.embed = table(c.vocab_size, c.d_model)
      keys = jax.random.split(rngs.params(), c.encoder_layers)
      self.encoder = jax.vmap(lambda key: _encoder_block(c, key))(keys)
      self.encoder_norm = layers.RMSNorm(c.d_model, eps=c.norm_eps)
    self.target_embed = table(c.target_vocab_size, c.d_model)
    # What a digit is worth depends on its place, which rotations tell only by
    # distances.
    self.slots = table(c.target_length, c.d_model)
    keys = jax.random.split(rngs.params(), c.decoder_layers)
    self.decoder = jax.vmap(
      lambda key: DecoderBlock(c, rngs=nnx.Rngs(params=key))
    )(keys)
    self.final_norm = layers.RMSNorm(c.d_model, eps=c.norm_eps)
    self.head = layers.Linear(c.d_model, c.target_vocab_size, rngs=rngs)


def _encoder_block(config: RegressionLMConfig, key: jax.Array) -> nnx.Module:
  rngs = nnx.Rngs(params=key)
  if config.encoder == "mamba2":
    return bidirectional.MambaBlock(config, rngs=rngs)
  return transformer.Block(config.attention, rngs=rngs)


init, bind = RegressionLM.init, RegressionLM.bind
abstract_params, num_params = (
  RegressionLM.abstract_params,
  RegressionLM.num_params,
)


def encode(
  config: RegressionLMConfig,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  compute: Compute = Compute(),  # noqa: B008 (frozen)
  dropout: float = 0.0,
  key: jax.Array | None = None,
) -> Memory:
  """Reads texts, each token of one seeing all of them.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, L) int32; what stands behind a row's length does not matter.
    lengths: (B,) int32, 1 to L.
    compute: how.
    dropout: share of what a layer adds that is dropped, in training.
    key: of dropout; None drops nothing.
  """
  model = bind(config, params)
  mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
  # Padding is embedded as token 0, so that ids out of range do no harm.
  tokens = jnp.where(mask, tokens, 0)
  keys = _layer_keys(key, config.encoder_layers, dropout)
  if config.encoder == T5GEMMA:
    text = model.encoder(
      tokens,
      mask,
      dtype=compute.dtype,
      remat=compute.remat,
      keys=keys,
      droppers=lambda key: _droppers(key, dropout),
    )
  else:
    text = _encode_own(config, model, tokens, mask, compute, dropout, keys)
  return _memory(config, model, text, lengths)


def _encode_own(config, model, tokens, mask, compute, dropout, keys):
  """Hidden states (B, L, D) of the encoders that are trained here."""
  positions = transformer.token_positions(tokens)
  x = model.embed(tokens).astype(compute.dtype)
  attend = _encoder_attend(config, mask, compute)

  def layer(x, block, layer_key):
    drop_mixed, drop_mlp = _droppers(layer_key, dropout)
    hooks = layers.MlpHooks(on_output=drop_mlp)
    if config.encoder == "mamba2":
      x = block(x, mask, hooks, compute.mamba, drop_mixed)
      return placement.rows(x), None
    mixed, _ = block.attn(block.attn_norm(x), positions, attend, None)
    x = x + drop_mixed(mixed)
    return placement.rows(x + block.mlp(block.mlp_norm(x), hooks)), None

  layer = placement.layer(layer, dtype=compute.dtype, remat=compute.remat)
  x, _ = jax.lax.scan(
    lambda x, both: layer(x, *both),
    x,
    (model.encoder, keys),
    unroll=compute.unroll or config.encoder_layers,
  )
  return model.encoder_norm(x)


def logits(
  config: RegressionLMConfig,
  params: Params,
  memory: Memory,
  targets: jax.Array,
  *,
  compute: Compute = Compute(),  # noqa: B008 (frozen)
  dropout: float = 0.0,
  key: jax.Array | None = None,
) -> jax.Array:
  """Logits of every target token given those before it, in one pass.

  Args:
    config: of the model.
    params: of the model.
    memory: of B texts.
    targets: (B, S, T) int32.
    compute: how.
    dropout: as for `encode`.
    key: as for `encode`.

  Returns:
    float32 (B, S, T, V); those of token t do not depend on tokens t and later.
  """
  model = bind(config, params)
  start = jnp.full_like(targets[..., :1], START)
  inputs = jnp.concatenate([start, targets[..., :-1]], axis=-1)
  x = _embed_targets(model, inputs, jnp.arange(inputs.shape[-1]), compute)
  shape = x.shape
  positions = jnp.broadcast_to(jnp.arange(shape[2]), (shape[0], *shape[1:3]))

  def attend(q, k, v, _):
    q, k, v = (y.reshape(-1, *y.shape[2:]) for y in (q, k, v))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return mixed.reshape(*shape[:3], -1), None

  def layer(x, block, k, v, layer_key):
    mix = lambda x: block.attn(x, positions, attend, None)
    x = _decoder_layer(
      block, x, mix, (k, v, memory.lengths), compute, layer_key, dropout
    )[0]
    return placement.rows(x)

  layer = placement.layer(
    layer, dtype=compute.dtype, remat=compute.remat, scanned=False
  )
  keys = _layer_keys(key, config.decoder_layers, dropout)
  for number, block in enumerate(_decoder_blocks(config, model)):
    layer_key = None if keys is None else keys[number]
    x = layer(x, block, memory.k[number], memory.v[number], layer_key)
  return model.head(model.final_norm(x), out_dtype=jnp.float32)


def init_cache(
  config: RegressionLMConfig,
  batch: int,
  rows: int,
  *,
  dtype: str = "float32",
) -> Cache:
  """A cache of B = `batch` texts with S = `rows` rows that are empty."""
  c = config
  shape = (batch, rows, c.target_length, c.num_kv_heads, c.head_dim)
  k, v = (
    tuple(jnp.zeros(shape, dtype) for _ in range(c.decoder_layers))
    for _ in range(2)
  )
  return Cache(k=k, v=v, length=jnp.zeros((), jnp.int32))


def step(
  config: RegressionLMConfig,
  params: Params,
  memory: Memory,
  tokens: jax.Array,
  cache: Cache,
  *,
  compute: Compute = Compute(),  # noqa: B008 (frozen)
) -> tuple[jax.Array, Cache]:
  """Reads one token (B, S) of every row behind those of `cache`.

  The first is `START`. The caller keeps to T steps.

  Returns:
    Logits of the next token, float32 (B, S, V), and the longer cache.
  """
  model = bind(config, params)
  place = cache.length
  x = _embed_targets(model, tokens[..., None], place[None], compute)
  positions = jnp.broadcast_to(place, x.shape[:-1])
  seen = jnp.arange(config.target_length) <= place

  def attend(q, k, v, layer_cache):
    all_k, all_v = (
      jax.lax.dynamic_update_slice_in_dim(whole, new, place, axis=2)
      for whole, new in zip(layer_cache, (k, v))
    )
    flat = (y.reshape(-1, *y.shape[2:]) for y in (q, all_k, all_v))
    mixed = jax.nn.dot_product_attention(*flat, mask=seen[None, None, None])
    return mixed.reshape(*x.shape[:-1], -1), (all_k, all_v)

  found = []
  for number, block in enumerate(_decoder_blocks(config, model)):
    layer_cache = cache.k[number], cache.v[number]
    mix = functools.partial(
      block.attn, positions=positions, attend=attend, layer_input=layer_cache
    )
    read = memory.k[number], memory.v[number], memory.lengths
    x, new = _decoder_layer(block, x, mix, read, compute)
    found.append(new)
  k, v = zip(*found)
  hidden = model.final_norm(x)[..., 0, :]
  logits = model.head(hidden, out_dtype=jnp.float32)
  return logits, Cache(k=k, v=v, length=place + 1)


def _encoder_attend(config, mask, compute) -> Attend | None:
  if config.encoder == "favor":
    features = bidirectional.favor_features(
      config.head_dim, config.num_features
    )
    return bidirectional.linear_attend(mask, features)
  if config.encoder == "linear":
    return bidirectional.linear_attend(mask, bidirectional.elu_features)
  return bidirectional.full_attend(mask, compute.attention)


def _decoder_blocks(config, model) -> list[DecoderBlock]:
  """The layers of the decoder, one by one."""
  return [
    jax.tree.map(lambda leaf, i=i: leaf[i], model.decoder)
    for i in range(config.decoder_layers)
  ]


def _memory(config, model, text: jax.Array, lengths: jax.Array) -> Memory:
  """Keys and values of every decoder layer for encoded texts (B, L, D)."""
  k, v = zip(
    *(
      block.cross.keys_and_values(text)
      for block in _decoder_blocks(config, model)
    )
  )
  return Memory(k=k, v=v, lengths=lengths)


def _decoder_layer(block, x, mix, memory, compute, key=None, dropout=0.0):
  """One block over (B, S, T, D); `mix` runs its self-attention.

  Args:
    block: of the decoder.
    x: what it reads.
    mix: maps the normed input to what is added, and an output of its own.
    memory: keys, values and lengths of the texts.
    compute: how.
    key: of dropout, or None.
    dropout: as for `encode`.
  """
  drop_mixed, drop_mlp = _droppers(key, dropout)
  mixed, output = mix(block.attn_norm(x))
  x = x + drop_mixed(mixed)
  # Only the name "xla" is passed on, because the kernel for long texts gains
  # nothing for few queries.
  implementation = "xla" if compute.attention == "xla" else None
  x = x + block.cross(block.cross_norm(x), *memory, implementation)
  hooks = layers.MlpHooks(on_output=drop_mlp)
  return x + block.mlp(block.mlp_norm(x), hooks), output


def _embed_targets(model, tokens, slots, compute) -> jax.Array:
  """(B, S, T, D) of tokens (B, S, T) at `slots` (T,)."""
  x = model.target_embed(tokens)
  x = x + jnp.broadcast_to(model.slots(slots), x.shape)
  return x.astype(compute.dtype)


def _layer_keys(key, count: int, dropout: float):
  if key is None or dropout == 0.0:
    return None
  return jax.random.split(key, count)


def _droppers(key, rate: float):
  """Functions for the two parts of a layer that add to the residual."""
  if key is None or rate == 0.0:
    return lambda x: x, None
  keys = jax.random.split(key)

  def dropper(key):
    def drop(x):
      kept = jax.random.bernoulli(key, 1 - rate, x.shape)
      return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))

    return drop

  return dropper(keys[0]), dropper(keys[1])
