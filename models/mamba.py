"""Mamba language models: Mamba-1, Mamba-2, and hybrids with attention.

Functional as `models.transformer` is: `bind`, `forward`, `prefill`, `decode`.
Neighbouring layers of one kind are stacked and scanned, so compile time does
not grow with depth; `MambaConfig.runs` lists the stacks, of which a model
without attention has one. Shapes by axis letter: B batch, T tokens, D width,
V vocabulary, S cache slots.

A left-padded batch, or rows of several packed texts, are told by `segment_ids`
as `ops.segments` defines them: negative for padding, another id for another
text. They give the numbers that each text gives alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers, module, transformer
from models.mamba_blocks import (
  AttentionBlock,
  AttentionCache,
  Implementations,
  MambaBlock,
  Pass,
  RecurrentState,
  step_run,
)
from models.mamba_config import MambaConfig, Run
from ops import segments

Params = module.Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaState:
  """What a model remembers of the tokens it has read.

  Attributes:
    layers: one state a run of `MambaConfig.runs`.
    length: (B,) int32, tokens read, padding not counted; the next one takes
      this position and cache slot.
    start: (B,) int32, slot at which the row's current text begins.
  """

  layers: tuple[RecurrentState | AttentionCache, ...]
  length: jax.Array
  start: jax.Array

  @property
  def dtype(self) -> jnp.dtype:
    """The dtype of the passes that made it."""
    first = self.layers[0]
    whole = first.conv if isinstance(first, RecurrentState) else first.k
    return whole.dtype


class Mamba(module.TokenModel):
  """The model: embed, scan the runs of blocks, norm, head."""

  def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
    """Random weights; `bind` puts converted ones in their place."""
    self.config = config
    vocab_size = config.padded_vocab_size
    self.embed = layers.Embedding(vocab_size, config.d_model, rngs=rngs)
    self.layers = nnx.List([_stack(config, run, rngs) for run in config.runs])
    self.final_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.lm_head = (
      None
      if config.tie_embeddings
      else layers.Linear(config.d_model, vocab_size, rngs=rngs)
    )

  def __call__(
    self,
    x: jax.Array,
    states: tuple[RecurrentState | AttentionCache, ...],
    run: Pass,
    *,
    remat: bool = False,
    unroll: int = 1,
  ) -> tuple[jax.Array, tuple[RecurrentState | AttentionCache, ...]]:
    """Runs all layers and the final norm.

    Args:
      x: (B, T, D) embedded tokens.
      states: one a run of the config.
      run: what all layers share.
      remat: recompute each layer in the backward pass instead of keeping what
        it computed.
      unroll: layers laid out flat in one iteration of the scan. A scan copies
        what a layer keeps for the backward pass, and its weights for a product;
        of as many as there are layers no scan is left, and they compile longer.

    Returns:
      Hidden states (B, T, D) in the dtype of the pass, and the new states.
    """

    def layer(carry, block_and_index):
      block, index = block_and_index
      return block(*carry, index, run), None

    if remat:
      layer = jax.checkpoint(layer, prevent_cse=False)
    stream = x.astype(jnp.float32), jnp.zeros(x.shape, run.dtype)
    new_states = []
    for stack, blocks, state in zip(
      self.config.runs, self.layers, states, strict=True
    ):
      if (stepped := step_run(blocks, stream, state, run)) is not None:
        stream, state = stepped
      else:
        indices = jnp.arange(stack.num_layers, dtype=jnp.int32)
        # The state is carried and updated in place: as an output of the scan it
        # would be a second copy of the donated one.
        (stream, state), _ = jax.lax.scan(
          layer, (stream, state), (blocks, indices), unroll=unroll
        )
      new_states.append(state)
    hidden, _ = run.add_and_norm(stream, self.final_norm)
    return hidden, tuple(new_states)


def _stack(config: MambaConfig, run: Run, rngs: nnx.Rngs) -> nnx.Module:
  block = MambaBlock if run.kind == "mamba" else AttentionBlock
  keys = jax.random.split(rngs.params(), run.num_layers)
  return jax.vmap(lambda key: block(config, rngs=nnx.Rngs(key)))(keys)


init, bind = Mamba.init, Mamba.bind
abstract_params, num_params = Mamba.abstract_params, Mamba.num_params


def init_state(
  config: MambaConfig,
  batch: int,
  *,
  cache_size: int | None = None,
  dtype: jnp.dtype = jnp.float32,
) -> MambaState:
  """The state of `batch` rows that have read nothing.

  Args:
    config: of the model.
    batch: rows.
    cache_size: slots of the key/value caches of a hybrid.
    dtype: of the passes to come.

  Raises:
    ValueError: a hybrid is given no `cache_size`.
  """
  c = config
  if c.attention and cache_size is None:
    raise ValueError("a model with attention layers needs a cache_size")
  found = []
  for run in c.runs:
    rows = (run.num_layers, batch)
    if run.kind == "attention":
      heads = (c.attention.num_kv_heads, c.attention.head_dim)
      k, v = (jnp.zeros((*rows, cache_size, *heads), dtype) for _ in range(2))
      found.append(AttentionCache(k=k, v=v))
      continue
    channels = (c.num_heads, c.head_dim) if c.kind == "mamba2" else (c.d_inner,)
    found.append(
      RecurrentState(
        conv=jnp.zeros((*rows, c.d_conv - 1, c.conv_channels), dtype),
        ssm=jnp.zeros((*rows, *channels, c.d_state), jnp.float32),
      )
    )
  # The two states are arrays of their own, because a donated buffer must not be
  # given twice.
  length, start = (jnp.zeros((batch,), jnp.int32) for _ in range(2))
  return MambaState(layers=tuple(found), length=length, start=start)


def left_padded(lengths: jax.Array, size: int) -> jax.Array:
  """Segment ids (B, size) of rows whose last `lengths` (B,) tokens count."""
  slots = jnp.arange(size, dtype=jnp.int32)[None]
  return jnp.where(slots < size - lengths[:, None], -1, 0).astype(jnp.int32)


def hidden_states(
  config: MambaConfig,
  params: Params,
  tokens: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  dtype: jnp.dtype | None = None,
  implementations: Implementations | None = None,
  remat: bool = False,
  unroll: int = 1,
) -> jax.Array:
  """Hidden states (B, T, D) of `tokens` (B, T), for a loss over `head`.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32; those that are padding may be anything in range.
    segment_ids: (B, T) int32 of packed or padded rows.
    dtype: of the work of the layers; None for that of the token table. The
      residual stream, norms, decays and states are float32 in any case.
    implementations: of the ops.
    remat: recompute each layer in the backward pass.
    unroll: layers in one iteration of the scan, see `Mamba`.
  """
  model = bind(config, params)
  implementations = implementations or Implementations()
  run = Pass(
    dtype=jnp.dtype(dtype or model.embed.dense().dtype),
    positions=transformer.token_positions(tokens),
    attend=_attend(segment_ids, implementations.attention),
    segment_ids=segment_ids,
    is_step=False,
    implementations=implementations,
  )
  states = tuple(
    RecurrentState() if stack.kind == "mamba" else AttentionCache()
    for stack in config.runs
  )
  embedded = model.embed(tokens)
  return model(embedded, states, run, remat=remat, unroll=unroll)[0]


def forward(
  config: MambaConfig, params: Params, tokens: jax.Array, **options
) -> jax.Array:
  """Float32 logits (B, T, V) of `tokens` (B, T) in one causal pass.

  Takes the options of `hidden_states`.
  """
  hidden = hidden_states(config, params, tokens, **options)
  return bind(config, params).logits(hidden)


def prefill(
  config: MambaConfig,
  params: Params,
  tokens: jax.Array,
  *,
  cache_size: int | None = None,
  state: MambaState | None = None,
  segment_ids: jax.Array | None = None,
  dtype: jnp.dtype | None = None,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, MambaState]:
  """Reads `tokens` (B, T), many at a time, into a new or a given state.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32.
    cache_size: slots of a hybrid's key/value caches, for a new state; the
      caller keeps each row's tokens within them.
    state: what was read before, or None; its `dtype` is kept.
    segment_ids: (B, T) int32, such as `left_padded`. A row's first text goes on
      from `state`; what follows goes on from the row's last text.
    dtype: as for `hidden_states`, for a new state.
    implementations: of the ops.

  Returns:
    Hidden states (B, T, D) after the final norm (`Mamba.logits` maps those that
    are wanted), and the state.

  Raises:
    ValueError: a hybrid is given neither `cache_size` nor `state`.
  """
  model = bind(config, params)
  if state is None:
    dtype = jnp.dtype(dtype or model.embed.dense().dtype)
    state = init_state(
      config, tokens.shape[0], cache_size=cache_size, dtype=dtype
    )
  ids = segment_ids
  if ids is None:
    ids = jnp.zeros(tokens.shape, jnp.int32)
  counted = jnp.cumsum(~segments.is_padding(ids), axis=1, dtype=jnp.int32)
  slots = state.length[:, None] + counted - 1
  starts = jnp.where(segments.resets(ids), slots, state.start[:, None])
  starts = jax.lax.cummax(starts, axis=1)
  run = Pass(
    dtype=state.dtype,
    positions=slots,
    attend=_cached_attend(slots, starts, segments.is_padding(ids)),
    segment_ids=segment_ids,
    is_step=False,
    implementations=implementations or Implementations(),
  )
  hidden, states = model(model.embed(tokens), state.layers, run)
  return hidden, MambaState(
    layers=states, length=slots[:, -1] + 1, start=starts[:, -1]
  )


def decode(
  config: MambaConfig,
  params: Params,
  tokens: jax.Array,
  state: MambaState,
  *,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, MambaState]:
  """Reads `tokens` (B, T), one or a few, without padding.

  The new state has the shapes and dtypes of the old one and is written in its
  place where the caller donates it.

  Returns:
    Float32 logits (B, T, V) and the state after the last token.
  """
  model = bind(config, params)
  steps = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)[None]
  slots = state.length[:, None] + steps - 1
  starts = jnp.broadcast_to(state.start[:, None], slots.shape)
  run = Pass(
    dtype=state.dtype,
    positions=slots,
    attend=_cached_attend(slots, starts),
    segment_ids=None,
    is_step=True,
    implementations=implementations or Implementations(),
  )
  hidden, states = model(model.embed(tokens), state.layers, run)
  return model.logits(hidden), MambaState(
    layers=states, length=slots[:, -1] + 1, start=state.start
  )


def _attend(
  segment_ids: jax.Array | None, implementation: str | None
) -> transformer.Attend:
  """Causal attention within each text of one call."""
  mask = None
  if segment_ids is not None:
    # Segments are numbered anew, because an id may come back as another text.
    texts = jnp.cumsum(segments.resets(segment_ids), axis=1)
    texts = jnp.where(segments.is_padding(segment_ids), -1, texts)
    mask = (texts[:, :, None] == texts[:, None, :])[:, None]

  def attend(q, k, v, cache_and_index):
    mixed = jax.nn.dot_product_attention(
      q, k, v, mask=mask, is_causal=True, implementation=implementation
    )
    return mixed, cache_and_index[0]

  return attend


def _cached_attend(
  slots: jax.Array, starts: jax.Array, padding: jax.Array | None = None
) -> transformer.Attend:
  """Attention that writes to `slots` (B, T) and sees those from `starts` on."""

  def attend(q, k, v, cache_and_index):
    cache, index = cache_and_index
    size = cache.k.shape[2]
    rows = jnp.arange(q.shape[0])[:, None]
    # Writes past the end are dropped.
    to = slots if padding is None else jnp.where(padding, size, slots)
    k, v = (
      whole.at[index, rows, to].set(new, mode="drop")
      for whole, new in ((cache.k, k), (cache.v, v))
    )
    all_slots = jnp.arange(size, dtype=jnp.int32)[None, None]
    mask = (all_slots >= starts[..., None]) & (all_slots <= slots[..., None])
    mixed = jax.nn.dot_product_attention(
      q,
      *(jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (k, v)),
      mask=mask[:, None],
    )
    return mixed, AttentionCache(k=k, v=v)

  return attend
