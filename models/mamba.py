"""Mamba language models: Mamba-1, Mamba-2, and hybrids with attention.

Functional as `models.transformer` is: `hidden_states`, `prefill`, `decode`.
Neighbouring layers of one kind are stacked and scanned, so compile time does
not grow with depth; `MambaConfig.runs` lists the stacks, of which a model
without attention has one. Shapes by axis letter: B batch, T tokens, D width,
V vocabulary, S cache slots.

A left-padded batch, or rows of several packed texts, are told by `segment_ids`
as `ops.segments` defines them: negative for padding, another id for another
text. They give the numbers that each text gives alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers, module, placement, transformer
from models.attention import causal_attend
from models.caches.dense import DenseCache
from models.caches.places import Places
from models.implementations import Implementations
from models.mamba_blocks import (
  AttentionBlock,
  MambaBlock,
  Pass,
  RecurrentState,
  Stream,
  step_run,
)
from models.mamba_config import MambaConfig, Run
from models.state_format import StateFormat
from models.state_format import own as own_state
from ops.quantized import Taps

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

  layers: tuple[RecurrentState | DenseCache, ...]
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
    states: tuple[RecurrentState | DenseCache | None, ...],
    run: Pass,
    *,
    remat: bool = False,
    unroll: int = 1,
  ) -> tuple[jax.Array, tuple[RecurrentState | DenseCache | None, ...]]:
    """Runs all layers and the final norm.

    Args:
      x: (B, T, D) embedded tokens.
      states: one a run of the config; None for attention without a cache.
      run: what all layers share.
      remat: recompute each layer in the backward pass instead of keeping what
        it computed.
      unroll: layers laid out flat in one iteration of the scan. A scan copies
        what a layer keeps for the backward pass, and its weights for a product;
        of as many as there are layers no scan is left, and they compile longer.

    Returns:
      Hidden states (B, T, D) in the dtype of the pass, and the new states.
    """
    scan = functools.partial(_scan, dtype=run.dtype, remat=remat, unroll=unroll)
    x = placement.rows(x.astype(jnp.float32))
    stream = x, placement.rows(jnp.zeros(x.shape, run.dtype))
    new_states = []
    for stack, blocks, state in zip(
      self.config.runs, self.layers, states, strict=True
    ):
      if stack.kind == "attention":
        stream, state = _attention_run(scan, blocks, stream, state, run)
      elif (stepped := step_run(blocks, stream, state, run)) is not None:
        stream, state = stepped
      else:
        # The state is carried and updated in place: as an output of the scan it
        # would be a second copy of the donated one.
        layer = lambda carry, block, index: (block(*carry, index, run), None)
        indices = jnp.arange(stack.num_layers, dtype=jnp.int32)
        (stream, state), _ = scan(layer, (stream, state), blocks, indices)
      new_states.append(state)
    hidden, _ = run.add_and_norm(stream, self.final_norm)
    return placement.rows(hidden), tuple(new_states)


def _scan(layer, carry, blocks, inputs, *, dtype, remat: bool, unroll: int):
  """`lax.scan` of `layer(carry, block, input)` over stacked blocks."""
  layer = placement.layer(layer, dtype=dtype, remat=remat)
  return jax.lax.scan(
    lambda carry, both: layer(carry, *both),
    carry,
    (blocks, inputs),
    unroll=unroll,
  )


def _attention_run(scan, blocks, stream, cache, run):
  """The stream behind a run of attention layers, and its cache."""
  if run.attend is None:
    run = dataclasses.replace(run, attend=cache.attend(run.places))
  layer = lambda stream, block, layer_cache: block(stream, layer_cache, run)
  old = cache
  if cache is not None:
    # A run reads its cache when its stream is there: XLA would else lay out the
    # keys of all runs for their products at the same time.
    stream, old = jax.lax.optimization_barrier((stream, cache))
  stream, new = scan(layer, stream, blocks, old)
  return stream, cache if new is None else cache.append(new, run.places)


def _stack(config: MambaConfig, run: Run, rngs: nnx.Rngs) -> nnx.Module:
  block = MambaBlock if run.kind == "mamba" else AttentionBlock
  keys = jax.random.split(rngs.params(), run.num_layers)
  return jax.vmap(lambda key: block(config, rngs=nnx.Rngs(key)))(keys)


init, bind = Mamba.init, Mamba.bind
abstract_params, num_params = Mamba.abstract_params, Mamba.num_params


def layers_of(config: MambaConfig) -> tuple[module.Layer, ...]:
  """All layers, in their order."""
  return tuple(
    module.Layer(("layers", number), index, run.kind)
    for number, run in enumerate(config.runs)
    for index in range(run.num_layers)
  )


def before_layers(
  config: MambaConfig, params: Params, tokens: jax.Array
) -> Stream:
  """What the first layer reads of `tokens` (B, T): a `Stream`."""
  x = bind(config, params).embed(tokens)
  return x.astype(jnp.float32), jnp.zeros_like(x)


def layer(
  config: MambaConfig, params: Params, kind: str, stream: Stream
) -> Stream:
  """One layer by itself, of whole texts.

  Args:
    config: of the model.
    params: of the layer.
    kind: "mamba" or "attention".
    stream: what it reads.
  """
  run = _whole_texts(stream)
  if kind == "attention":
    block = module.module_over(AttentionBlock, config, params)
    return block(stream, None, run)[0]
  block = module.module_over(MambaBlock, config, params)
  return block(stream, RecurrentState(), jnp.int32(0), run)[0]


def after_layers(
  config: MambaConfig, params: Params, stream: Stream
) -> jax.Array:
  """Hidden states (B, T, D) of what the last layer gives."""
  norm = bind(config, params).final_norm
  return _whole_texts(stream).add_and_norm(stream, norm)[0]


def _whole_texts(stream: Stream) -> Pass:
  x, y = stream
  return Pass(
    dtype=y.dtype,
    positions=transformer.token_positions(x[..., 0]),
    attend=causal_attend(keep=False),
    places=None,
    segment_ids=None,
    is_step=False,
    implementations=Implementations(),
  )


def init_state(
  config: MambaConfig,
  batch: int,
  *,
  cache_size: int | None = None,
  dtype: jnp.dtype = jnp.float32,
  state_format: StateFormat | None = None,
  params: Params | None = None,
) -> MambaState:
  """The state of `batch` rows that have read nothing.

  Args:
    config: of the model.
    batch: rows.
    cache_size: slots of the key/value caches of a hybrid.
    dtype: of the passes to come.
    state_format: of the recurrent states; None for what the `Taps` of `params`
      say, which is float32 where there are none.
    params: of the model, where its state has scales or a format of its own.

  Raises:
    ValueError: a hybrid is given no `cache_size`.
    InputError: the format does not fit the model's shapes.
  """
  c = config
  if c.attention and cache_size is None:
    raise ValueError("a model with attention layers needs a cache_size")
  found = []
  empty = state_format.empty if state_format else own_state
  for index, run in enumerate(c.runs):
    rows = (run.num_layers, batch)
    if run.kind == "attention":
      heads = (c.attention.num_kv_heads, c.attention.head_dim)
      own = params["layers"][index]["attn"].get("taps") if params else None
      found.append(DenseCache.empty((*rows, cache_size, *heads), dtype, own))
      continue
    channels = (c.num_heads, c.head_dim) if c.kind == "mamba2" else (c.d_inner,)
    mixer = params["layers"][index]["mixer"] if params else {}
    shapes = (
      (*rows, c.d_conv - 1, c.conv_channels),
      (*rows, *channels, c.d_state),
    )
    conv, ssm = empty(shapes, dtype, mixer.get("taps", Taps()), run.start)
    found.append(RecurrentState(conv=conv, ssm=ssm))
  # The two states are arrays of their own, because a donated buffer must not be
  # given twice.
  length, start = (jnp.zeros((batch,), jnp.int32) for _ in range(2))
  return MambaState(layers=tuple(found), length=length, start=start)


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
  """Hidden states (B, T, D) of `tokens` (B, T), in one causal pass.

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
    attend=causal_attend(
      segment_ids, implementation=implementations.attention, keep=False
    ),
    places=None,
    segment_ids=segment_ids,
    is_step=False,
    implementations=implementations,
  )
  states = tuple(
    RecurrentState() if stack.kind == "mamba" else None for stack in config.runs
  )
  embedded = model.embed(tokens)
  return model(embedded, states, run, remat=remat, unroll=unroll)[0]


def prefill(
  config: MambaConfig,
  params: Params,
  tokens: jax.Array,
  *,
  cache_size: int | None = None,
  lengths: jax.Array | None = None,
  dtype: jnp.dtype | None = None,
  state: MambaState | None = None,
  state_format: StateFormat | None = None,
  segment_ids: jax.Array | None = None,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, MambaState]:
  """Reads `tokens` (B, T), many at a time, into a new or a given state.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32.
    cache_size: slots of a hybrid's key/value caches, for a new state; the
      caller keeps each row's tokens within them.
    lengths: (B,) int32, 1 to T: tokens of each row, the rest of which may be
      anything in range; None for T, or for what `segment_ids` say.
    dtype: as for `hidden_states`, for a new state.
    state: what was read before, or None; its `dtype` and formats are kept.
    state_format: as for `init_state`, for a new state.
    segment_ids: (B, T) int32, -1 where there is padding. A row's first text
      goes on from `state`; what follows goes on from the row's last text.
    implementations: of the ops.

  Returns:
    Hidden states (B, T, D) after the final norm (`Mamba.logits` maps those that
    are wanted), and the state.

  Raises:
    ValueError: a hybrid is given neither `cache_size` nor `state`.
  """
  model = bind(config, params)
  implementations = implementations or Implementations()
  if lengths is not None:
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    segment_ids = jnp.where(steps < lengths[:, None], 0, -1)
  attend = None
  if state is None:
    dtype = jnp.dtype(dtype or model.embed.dense().dtype)
    state = init_state(
      config,
      tokens.shape[0],
      cache_size=cache_size,
      dtype=dtype,
      state_format=state_format,
      params=params,
    )
    # An empty cache is not read.
    attend = causal_attend(
      segment_ids, implementation=implementations.attention
    )
  ids = segment_ids
  if ids is None:
    ids = jnp.zeros(tokens.shape, jnp.int32)
  places = Places.of_segments(state.length, state.start, ids)
  run = Pass(
    dtype=state.dtype,
    positions=places.slots,
    attend=attend,
    places=places,
    segment_ids=segment_ids,
    is_step=False,
    implementations=implementations,
  )
  hidden, states = model(model.embed(tokens), state.layers, run)
  return hidden, MambaState(
    layers=states, length=places.length, start=places.starts[:, -1]
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
  places = Places.after(state.length, tokens.shape[1], state.start)
  run = Pass(
    dtype=state.dtype,
    positions=places.slots,
    attend=None,
    places=places,
    segment_ids=None,
    is_step=True,
    implementations=implementations or Implementations(),
  )
  hidden, states = model(model.embed(tokens), state.layers, run)
  logits = model.logits(hidden, run.implementations.head)
  return logits, MambaState(
    layers=states, length=places.length, start=state.start
  )
