"""One decoder for Llama-3.x, SmolLM2, Qwen2.5, Qwen3 and Gemma 3.

Grouped-query attention, rotary positions, RMSNorm, gated MLP, tied or untied
head. Layers are stacked and scanned, so compile time does not grow with
depth; where some of them slide, the scan is told how far each layer sees and
how it rotates. Shapes by axis letter: B batch, T tokens, S cache slots, L
layers, D width, H query heads, N key/value heads, K head dimension, V
vocabulary.

How attention reads its keys is an argument (`attend`), and so are hooks
around the MLP: methods that change what a token computes (`research/sol`)
run this very module instead of a copy.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import layers, module, placement
from models.attention import Attend, causal_attend
from models.caches.dense import DenseCache
from models.caches.paged import PageBudget, PagedCache
from models.caches.places import Places
from models.caches.sliding import SlidingCache
from models.errors import InputError
from models.implementations import Implementations
from models.state_format import StateFormat
from models.transformer_config import TransformerConfig
from ops.quantized import Taps, rounded
from ops.transformer_step import TransformerWeights, transformer_step

Params = module.Params
# Slots that attention to a dense cache takes at a time.
_CHUNK = 128
# What `behind` is in layers that see all.
_ALL = 1 << 30
# Kind of the layers that see the nearest tokens alone.
_SLIDING = "sliding"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerState:
  """What a model remembers of the tokens it has read.

  Attributes:
    cache: keys and values of all layers.
    length: (B,) int32, tokens read; the next one of row b takes position and
      slot `length[b]`.
  """

  cache: DenseCache | SlidingCache
  length: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerView:
  """How far a layer sees and how it rotates, where layers differ in that.

  Attributes:
    frequencies: (K / 2,) of its rotations, in radians a position.
    behind: () int32 or an integer, how many tokens in front of it a token sees;
      None for all.
  """

  frequencies: jax.Array | np.ndarray
  behind: jax.Array | int | None


class Attention(nnx.Module):
  """Grouped-query attention: project, let `attend` mix, project back.

  Where `taps` say so, keys and values are rounded, and caches keep them in few
  bits.
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    """Builds the four projections and, where there are some, q/k norms."""
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
    self.taps = nnx.Param(Taps())

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    attend: Attend,
    layer_input: Any,
    view: LayerView | None = None,
  ) -> tuple[jax.Array, Any]:
    """Maps (..., D) at `positions` (...); passes `attend`'s output on."""
    c = self.config
    q, k, v = (
      y.reshape(*x.shape[:-1], -1, c.head_dim)
      for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
    )
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    frequencies = _frequencies(c) if view is None else view.frequencies
    if c.query_scalar not in (None, c.head_dim):
      q = q * jnp.asarray(math.sqrt(c.head_dim / c.query_scalar), q.dtype)
    q = layers.apply_rope(q, positions, frequencies)
    k = layers.apply_rope(k, positions, frequencies)
    q, k, v = map(placement.heads, (q, k, v))
    taps = self.taps.get_value()
    k, v = rounded(k, taps.k), rounded(v, taps.v)
    behind = () if view is None or view.behind is None else (view.behind,)
    mixed, layer_output = attend(q, k, v, layer_input, *behind)
    mixed = placement.heads(mixed).reshape(*x.shape[:-1], -1)
    return placement.rows(self.o_proj(mixed)), layer_output


class Block(nnx.Module):
  """Pre-norm residual block, with norms behind its parts where asked for."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    """Builds attention, MLP and their norms."""
    norm = functools.partial(
      layers.RMSNorm, config.d_model, eps=config.norm_eps
    )
    self.attn_norm, self.mlp_norm = norm(), norm()
    self.post_attn_norm = norm() if config.post_norms else None
    self.post_mlp_norm = norm() if config.post_norms else None
    self.attn = Attention(config, rngs=rngs)
    self.mlp = layers.GatedMlp(
      config.d_model, config.d_ff, activation=config.activation, rngs=rngs
    )
    if config.scaled_outputs:
      for written in (self.attn.o_proj, self.mlp.down_proj):
        written.rescale((2 * config.num_layers) ** -0.5)

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    attend: Attend,
    layer_input: Any,
    hooks: layers.MlpHooks,
    dtype: jnp.dtype,
    view: LayerView | None = None,
  ) -> tuple[jax.Array, Any]:
    """Maps (..., D), working in `dtype`; and the output of `attend`."""
    behind = lambda norm, y: y if norm is None else norm(y)
    normed = placement.rows(self.attn_norm(x, dtype=dtype))
    mixed, layer_output = self.attn(
      normed, positions, attend, layer_input, view
    )
    x = x + behind(self.post_attn_norm, mixed)
    normed = placement.rows(self.mlp_norm(x, dtype=dtype))
    y = self.mlp(normed, hooks)
    return x + behind(self.post_mlp_norm, y), layer_output


class Transformer(module.TokenModel):
  """The decoder: embed, scan the blocks, norm, head."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    """Random weights; `bind` puts converted ones in their place."""
    self.config = config
    scale = math.sqrt(config.d_model) if config.scaled_embeddings else None
    self.embed = layers.Embedding(
      config.padded_vocab_size, config.d_model, scale=scale, rngs=rngs
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
    dtype: jnp.dtype | None = None,
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
      dtype: of the layers' work; None for that of `x`.
      remat: keep only each layer's input for the backward pass, and compute
        the layer a second time there.
      unroll: layers laid out flat in one iteration of the scan. A scan copies
        what a layer keeps for the backward pass, and its weights for a product;
        of as many as there are layers no scan is left, and they compile longer.

    Returns:
      Hidden states (..., D) in `dtype`, and `attend`'s outputs stacked over L.
    """
    hooks, dtype = hooks or layers.MlpHooks(), dtype or x.dtype

    def layer(x, block, layer_input, view):
      x, output = block(x, positions, attend, layer_input, hooks, dtype, view)
      return placement.rows(x), output

    layer = placement.layer(layer, dtype=dtype, remat=remat)
    x = x.astype(jnp.float32 if self.config.float32_stream else dtype)
    x, layer_outputs = jax.lax.scan(
      lambda x, each: layer(x, *each),
      placement.rows(x),
      (self.layers, layer_inputs, _views(self.config)),
      unroll=unroll,
    )
    return placement.rows(self.final_norm(x, dtype=dtype)), layer_outputs

  def weights(self) -> TransformerWeights:
    """Those of the layers, stacked, as `ops.transformer_step` takes them."""
    attn, mlp = self.layers.attn, self.layers.mlp
    projections = {
      f"{one}_proj": getattr(part, f"{one}_proj").stored()
      for part, names in ((attn, "qkvo"), (mlp, ("gate", "up", "down")))
      for one in names
    }
    biases = {
      f"{one}_bias": getattr(attn, f"{one}_proj").bias[...]
      for one in "qkv" * self.config.qkv_bias
    }
    norms = {
      f"{one}_norm": getattr(attn, f"{one}_norm").scale[...]
      for one in "qk" * self.config.qk_norm
    }
    return TransformerWeights(
      attn_norm=self.layers.attn_norm.scale[...],
      mlp_norm=self.layers.mlp_norm.scale[...],
      taps=attn.taps.get_value(),
      **projections,
      **biases,
      **norms,
    )


init, bind = Transformer.init, Transformer.bind
abstract_params, num_params = (
  Transformer.abstract_params,
  Transformer.num_params,
)


def _frequencies(c: TransformerConfig, sliding: bool = False) -> np.ndarray:
  if sliding:
    return layers.rope_frequencies(c.head_dim, c.sliding_rope_theta)
  return layers.rope_frequencies(
    c.head_dim, c.rope_theta, c.rope_scaling, c.rope_factor
  )


def _views(config: TransformerConfig) -> LayerView | None:
  """Those of all layers, stacked; None where all see and rotate alike."""
  sliding = np.array(config.sliding)
  if not config.sliding:
    return None
  frequencies = np.where(
    sliding[:, None], _frequencies(config, True), _frequencies(config)
  )
  behind = np.where(sliding, config.behind, _ALL).astype(np.int32)
  return LayerView(
    frequencies=jnp.asarray(frequencies), behind=jnp.asarray(behind)
  )


def _view(config: TransformerConfig, kind: str) -> LayerView:
  sliding = kind == _SLIDING
  return LayerView(
    frequencies=_frequencies(config, sliding),
    behind=config.behind if sliding else None,
  )


def layers_of(config: TransformerConfig) -> tuple[module.Layer, ...]:
  """All layers, in their order."""
  sliding = config.sliding or (False,) * config.num_layers
  return tuple(
    module.Layer(("layers",), index, _SLIDING if slides else "decoder")
    for index, slides in enumerate(sliding)
  )


def before_layers(
  config: TransformerConfig, params: Params, tokens: jax.Array
) -> jax.Array:
  """What the first layer reads of `tokens` (B, T): (B, T, D)."""
  x = bind(config, params).embed(tokens)
  return x.astype(jnp.float32) if config.float32_stream else x


def layer(
  config: TransformerConfig, params: Params, kind: str, x: jax.Array
) -> jax.Array:
  """One layer by itself, of whole texts.

  Args:
    config: of the model.
    params: of the layer.
    kind: of the layer, as `layers_of` has it.
    x: what it reads, (B, T, D).

  Returns:
    What the next one reads, alike.
  """
  block = module.module_over(Block, config, params)
  read = token_positions(x[..., 0]), causal_attend(keep=False)
  # Norms may be wider than the rest.
  dtype = params["attn"]["o_proj"]["kernel"].dtype
  view = _view(config, kind)
  return block(x, *read, None, layers.MlpHooks(), dtype, view)[0]


def after_layers(
  config: TransformerConfig, params: Params, x: jax.Array
) -> jax.Array:
  """Hidden states (B, T, D) of what the last layer gives."""
  norm = bind(config, params).final_norm
  return norm(x, dtype=params["embed"]["table"].dtype)


def token_positions(tokens: jax.Array) -> jax.Array:
  """Positions 0..T-1 for every row of (B, T)."""
  steps = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
  return jnp.broadcast_to(steps[None], tokens.shape)


def hidden_states(
  config: TransformerConfig,
  params: Params,
  tokens: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  dtype: jnp.dtype | None = None,
  implementations: Implementations | None = None,
  remat: bool = False,
  unroll: int = 1,
) -> jax.Array:
  """Hidden states (B, T, D) of `tokens` (B, T) in one causal pass.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32; those that are padding may be anything in range.
    segment_ids: (B, T) int32 of packed or padded rows, see `ops.segments`.
    dtype: of activations; None for that of the token table.
    implementations: of the ops.
    remat: compute layers again in the backward pass, see `Transformer`.
    unroll: layers in one iteration of the scan, see `Transformer`.
  """
  attend = causal_attend(
    segment_ids, implementation=_attention(implementations), keep=False
  )
  return _read(
    config, params, tokens, attend, dtype, remat=remat, unroll=unroll
  )[0]


def _read(config, params, tokens, attend, dtype, **options):
  model = bind(config, params)
  x, positions = model.embed(tokens), token_positions(tokens)
  return model(x, positions, attend, dtype=dtype, **options)


def _attention(implementations: Implementations | None) -> str | None:
  return implementations.attention if implementations else None


def init_state(
  config: TransformerConfig,
  batch: int,
  *,
  cache_size: int,
  dtype: jnp.dtype = jnp.float32,
  state_format: StateFormat | None = None,
  params: Params | None = None,
) -> TransformerState:
  """The state of `batch` rows that have read nothing.

  Args:
    config: of the model.
    batch: rows.
    cache_size: slots for tokens; of more than 128 there are a multiple of that,
      so that attention takes them in equal chunks.
    dtype: of the passes to come.
    state_format: of recurrent states, which there are none of: None.
    params: of the model, whose `Taps` may name formats of keys and values.

  Raises:
    InputError: a format is given.
  """
  _check_state_format(state_format)
  c = config
  taps = params["layers"]["attn"].get("taps") if params else None
  shape = (batch, cache_size, c.num_kv_heads, c.head_dim)
  if c.sliding:
    cache = SlidingCache.empty(
      shape, dtype, taps, sliding=c.sliding, behind=c.behind
    )
  else:
    if cache_size > _CHUNK:
      cache_size = -(-cache_size // _CHUNK) * _CHUNK
    shape = (c.num_layers, batch, cache_size, c.num_kv_heads, c.head_dim)
    cache = DenseCache.empty(shape, dtype, taps)
  return TransformerState(cache=cache, length=jnp.zeros((batch,), jnp.int32))


def _check_state_format(state_format: StateFormat | None) -> None:
  if state_format is not None:
    raise InputError(
      f"state_format={state_format}: a Transformer has no recurrent state: "
      "leave it out"
    )


def prefill(
  config: TransformerConfig,
  params: Params,
  tokens: jax.Array,
  *,
  cache_size: int,
  lengths: jax.Array | None = None,
  dtype: jnp.dtype | None = None,
  state_format: StateFormat | None = None,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, TransformerState]:
  """Reads `tokens` (B, T) into a new cache of `cache_size` slots.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32.
    cache_size: slots, at least T.
    lengths: (B,) int32, 1 to T: tokens of each row, the rest of which may be
      anything in range; None for T. Nothing causal sees what comes later, and
      its slots are written over before a mask lets them be seen.
    dtype: of activations and cache; None for that of the token table.
    state_format: of recurrent states, which there are none of: None.
    implementations: of the ops.

  Returns:
    Hidden states (B, T, D) after the final norm (`Transformer.logits` maps
    those that are wanted), and the state.

  Raises:
    ValueError: the tokens do not fit into the cache.
    InputError: a format of states is given.
  """
  _check_state_format(state_format)
  batch, length = tokens.shape
  if length > cache_size:
    raise ValueError(f"{length} tokens do not fit into {cache_size} slots")
  attend = causal_attend(implementation=_attention(implementations))
  hidden, new = _read(config, params, tokens, attend, dtype)
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  state = init_state(
    config, batch, cache_size=cache_size, dtype=new[0].dtype, params=params
  )
  return hidden, TransformerState(
    cache=state.cache.filled(new, lengths), length=lengths
  )


def decode(
  config: TransformerConfig,
  params: Params,
  tokens: jax.Array,
  state: TransformerState,
  *,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, TransformerState]:
  """Reads `tokens` (B, T), one or several, behind those of `state`.

  Rows may differ in length. The caller keeps `length + T` within the cache;
  slots past its end would be dropped. The new state has the shapes and dtypes
  of the old one and is written in its place where the caller donates it.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32.
    state: what was read before.
    implementations: of ops: `step` of `ops.transformer_step`, which computes
      the layers of all but Gemma.

  Returns:
    Float32 logits (B, T, V) and the longer state.
  """
  hidden, state = read(
    config, params, tokens, state, implementations=implementations
  )
  return bind(config, params).logits(hidden), state


def read(
  config: TransformerConfig,
  params: Params,
  tokens: jax.Array,
  state: TransformerState,
  *,
  num_pages: jax.Array | None = None,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, TransformerState]:
  """As `decode`, but gives hidden states behind the final norm, (B, T, D).

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32.
    state: what was read before.
    num_pages: (B,) int32, pages of a `PagedCache` that each key head reads;
      None for what its budget says.
    implementations: of ops, see `decode`.
  """
  model, cache = bind(config, params), state.cache
  embedded = model.embed(tokens)
  if config.has_token_kernel:
    hidden, cache = _by_op(
      model, embedded, cache, state.length, num_pages, implementations
    )
    length = state.length + tokens.shape[1]
  else:
    places = Places.after(state.length, tokens.shape[1])
    hidden, new = model(
      embedded,
      places.slots,
      cache.attend(places),
      layer_inputs=cache.layer_inputs(),
      dtype=cache.dtype,
    )
    cache, length = cache.append(new, places), places.length
  return hidden, TransformerState(cache=cache, length=length)


def _by_op(model, x, cache, lengths, num_pages, implementations):
  """Hidden states behind all layers and the final norm, and the cache."""
  c, dtype = model.config, cache.dtype
  is_paged = isinstance(cache, PagedCache)
  pages = cache.pages(lengths, num_pages) if is_paged else None
  x, keys, values, *summary = transformer_step(
    x.astype(jnp.float32 if c.float32_stream else dtype),
    model.weights(),
    cache.k,
    cache.v,
    lengths,
    _frequencies(c),
    eps=c.norm_eps,
    pages=pages,
    implementation=implementations.step if implementations else None,
  )
  hidden = model.final_norm(x, dtype=dtype)
  if is_paged:
    made = summary[0] if summary else None
    return hidden, cache.grown(keys, values, lengths + 1, made)
  return hidden, dataclasses.replace(cache, k=keys, v=values)


def with_pages(
  config: TransformerConfig, state: TransformerState, budget: PageBudget
) -> TransformerState:
  """The state with a cache of which tokens read the best pages alone.

  Args:
    config: of the model.
    state: of `prefill`, say.
    budget: of the tokens to come, one of each row at a time.

  Raises:
    InputError: the model or its cache has no pages.
  """
  if not config.has_token_kernel:
    raise InputError(
      "pages of a cache are for Llama and its like, not for Gemma: leave them "
      "out"
    )
  cache = PagedCache.of(state.cache, state.length, budget)
  return dataclasses.replace(state, cache=cache)
