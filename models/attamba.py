"""Attamba: attention to a window of tokens and to chunks of what was before.

Keys and values of a chunk come from state spaces that read it (Attamba,
arXiv:2411.17685), or from pooling it, or from its last token alone; see
`AttambaConfig`. Functional as `models.transformer` is: `hidden_states`,
`prefill`, `decode`. Neighbouring layers of one chunk size are stacked and
scanned. Shapes by axis letter: B batch, T tokens, D width, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import chunks, layers, module, placement, transformer
from models.attamba_blocks import Block, RunState, empty_run, steps
from models.attamba_config import AttambaConfig, Run
from models.attamba_released import ReleasedPass
from models.caches.chunked import LayerInPlace
from models.chunks import Texts
from models.errors import InputError
from models.implementations import Implementations
from models.mamba_blocks import Pass
from models.state_format import StateFormat

Params = module.Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttambaState:
  """What a model remembers of the tokens it has read.

  Attributes:
    layers: one state a run of `AttambaConfig.runs`.
    length: (B,) int32, tokens read; the next one takes this position.
  """

  layers: tuple[RunState, ...]
  length: jax.Array

  @property
  def dtype(self) -> jnp.dtype:
    """The dtype of the passes that made it."""
    return self.layers[0].cache.ring_k.dtype


class Attamba(module.TokenModel):
  """The model: embed, scan the runs of blocks, norm, head."""

  def __init__(self, config: AttambaConfig, *, rngs: nnx.Rngs):
    """Random weights; `bind` puts converted ones in their place."""
    self.config = config
    rows = config.padded_vocab_size
    self.embed = layers.Embedding(rows, config.d_model, rngs=rngs)
    self.layers = nnx.List([_stack(config, run, rngs) for run in config.runs])
    self.final_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.lm_head = (
      None
      if config.tie_embeddings
      else layers.Linear(config.d_model, rows, rngs=rngs)
    )
    # Chunks of P tokens each, until a tokenizer tells what its tokens cost.
    self.chunk_costs = (
      nnx.Param(jnp.full((config.vocab_size,), 1 / config.chunk_sizes[0]))
      if chunks.by_token(config)
      else None
    )

  def costs(self, tokens: jax.Array) -> jax.Array | None:
    """Costs (B, T) of tokens, where they end chunks; else None."""
    if self.chunk_costs is None:
      return None
    return chunks.token_costs(self.chunk_costs[...], tokens)

  def read(
    self,
    tokens: jax.Array,
    shared: Pass,
    *,
    lengths: jax.Array | None = None,
    cache_size: int | None = None,
    remat: bool = False,
    unroll: int = 1,
  ) -> tuple[jax.Array, AttambaState | None]:
    """Reads many tokens at a time from an empty state.

    Args:
      tokens: (B, T) int32.
      shared: what all layers share.
      lengths: (B,) int32 where a state is wanted: tokens of the rows.
      cache_size: tokens that the state has room for.
      remat: compute each layer again in the backward pass.
      unroll: layers laid out flat in one iteration of the scan.

    Returns:
      Hidden states (B, T, D) after the final norm, and the state or None.
    """
    texts = Texts.of(tokens.shape, shared.segment_ids)
    costs = self.costs(tokens)
    x = self.embed(tokens).astype(jnp.float32)
    states = []
    for run, blocks in zip(self.config.runs, self.layers, strict=True):
      layer = functools.partial(
        _read_layer, self.config, run, texts, shared, lengths, cache_size
      )
      layer = functools.partial(layer, _by_cost(self.config, run, costs, texts))
      layer = placement.layer(layer, dtype=shared.dtype, remat=remat)
      indices = jnp.arange(run.start, run.stop, dtype=jnp.int32)
      x, (state, found) = jax.lax.scan(
        lambda x, both, layer=layer: layer(x, *both),
        x,
        (blocks, indices),
        unroll=unroll,
      )
      states.append(state)
      costs = costs if found is None else found[0]
    hidden = self.final_norm(x, dtype=shared.dtype)
    if lengths is None:
      return hidden, None
    return hidden, AttambaState(layers=tuple(states), length=lengths)

  def step(
    self, tokens: jax.Array, state: AttambaState, shared: Pass
  ) -> tuple[jax.Array, AttambaState]:
    """The same of a few tokens (B, T) behind a state."""
    slots, costs = shared.positions, self.costs(tokens)
    by_name = shared.implementations.step
    in_place = by_name not in (None, "xla")
    x = self.embed(tokens).astype(jnp.float32)
    states = []
    for run, blocks, old in zip(
      self.config.runs, self.layers, state.layers, strict=True
    ):

      def layer(x, both, run=run, costs=costs, cache=old.cache):
        block, index, own = both
        if in_place:
          cache = LayerInPlace(
            whole=cache,
            layer=index - run.start,
            seen_from=own.cache,
            implementation=by_name,
          )
          own = dataclasses.replace(own, cache=cache)
        new = steps(self.config, run, index, slots, costs, own)
        x, rest = block(
          x, shared, lambda attn, y: attn.step(y, run, own, new, shared)
        )
        # The old keys are read before new ones are written: XLA would else
        # keep them by copying the cache.
        return jax.lax.optimization_barrier((x, rest))

      indices = jnp.arange(run.start, run.stop, dtype=jnp.int32)
      read = old.cache.seen_from if in_place else old.cache
      read = dataclasses.replace(old, cache=read)
      x, (new, rest, found) = jax.lax.scan(layer, x, (blocks, indices, read))
      costs = costs if found is None else found[0]
      cache = old.cache.append(new, slots)
      states.append(dataclasses.replace(rest, cache=cache))
    hidden = self.final_norm(x, dtype=shared.dtype)
    return hidden, AttambaState(layers=tuple(states), length=slots[:, -1] + 1)


def _stack(config: AttambaConfig, run: Run, rngs: nnx.Rngs) -> nnx.Module:
  keys = jax.random.split(rngs.params(), run.num_layers)
  return jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)


def _by_cost(config, run, costs, texts):
  """Where chunks end by their tokens: (closed, costs of the open one)."""
  if costs is None:
    return None
  zero = jnp.zeros(costs.shape[:1], jnp.int32)
  closed, _, spent = chunks.closed_by_cost(
    config, run, costs, texts.places, zero, zero
  )
  return closed, spent


def _read_layer(
  config, run, texts, shared, lengths, cache_size, by_cost, x, block, index
):
  """One layer of `Attamba.read`."""
  places = texts.places
  closed, spent = by_cost or (
    chunks.closed_by_place(config, run, index, places),
    None,
  )
  if lengths is None and shared.segment_ids is not None:
    most = chunks.most_kept(config, run, places.shape[1])
  else:
    most = config.most_chunks(run.size, cache_size or places.shape[1])
  layout = chunks.find(
    config, closed, texts, most, keep_all=lengths is not None
  )

  def attend(attn, y):
    return attn.read(y, run, layout, texts, shared, lengths, spent)

  x, (state, costs) = block(x, shared, attend)
  return x, (state, costs)


init, bind = Attamba.init, Attamba.bind
abstract_params, num_params = Attamba.abstract_params, Attamba.num_params


def with_chunks(
  config: AttambaConfig,
  params: Params,
  *,
  chunk_size: int | None = None,
  window: int | None = None,
) -> tuple[AttambaConfig, Params]:
  """The same weights with other chunks or another window.

  No weight depends on either: a model may be read with more or fewer keys than
  it was trained with. What tokens cost is a share of a chunk, so it shrinks as
  chunks grow.

  Args:
    config: of the model.
    params: of the model.
    chunk_size: P of all layers; None leaves them.
    window: L; None leaves it.

  Raises:
    InputError: layers have different chunks, or the sizes do not do.
  """
  sizes = config.chunk_sizes
  if chunk_size is not None:
    if len(set(sizes)) > 1:
      raise InputError(
        f"chunks of its layers have {', '.join(map(str, sizes))} tokens, which "
        "one size cannot take the place of: train another model"
      )
    if "chunk_costs" in params:
      costs = params["chunk_costs"] * (sizes[0] / chunk_size)
      params = params | {"chunk_costs": jnp.minimum(costs, 1)}
    sizes = (chunk_size,) * len(sizes)
  window = config.window if window is None else window
  return (
    dataclasses.replace(config, chunk_sizes=sizes, window=window),
    params,
  )


def layers_of(config: AttambaConfig) -> tuple[module.Layer, ...]:
  """All layers, in their order; the kind names the layer's number."""
  return tuple(
    module.Layer(("layers", number), index, f"attamba_{run.start + index}")
    for number, run in enumerate(config.runs)
    for index in range(run.num_layers)
  )


def before_layers(
  config: AttambaConfig, params: Params, tokens: jax.Array
) -> tuple[jax.Array, Any]:
  """What the first layer reads of `tokens` (B, T): (B, T, D), and costs."""
  model = bind(config, params)
  return model.embed(tokens).astype(jnp.float32), model.costs(tokens)


def layer(
  config: AttambaConfig, params: Params, kind: str, stream: Any
) -> tuple[jax.Array, Any]:
  """One layer by itself, of whole texts.

  Args:
    config: of the model.
    params: of the layer.
    kind: of `layers_of`.
    stream: what it reads.

  Returns:
    What the next one reads, alike.
  """
  x, costs = stream
  number = int(kind.removeprefix("attamba_"))
  run = next(run for run in config.runs if number < run.stop)
  block = module.module_over(Block, config, params)
  dtype = params["attn_norm"]["scale"].dtype
  texts = Texts.of(x.shape[:2], None)
  shared = _pass(dtype, texts.slots, None, None, config.semantics)
  by_cost = _by_cost(config, run, costs, texts)
  x, (_, found) = _read_layer(
    config, run, texts, shared, None, None, by_cost, x,
    block, jnp.int32(number),
  )  # fmt: skip
  return x, costs if found is None else found


def after_layers(
  config: AttambaConfig, params: Params, stream: Any
) -> jax.Array:
  """Hidden states (B, T, D) of what the last layer gives."""
  norm = bind(config, params).final_norm
  return norm(stream[0], dtype=params["final_norm"]["scale"].dtype)


def _pass(
  dtype, positions, segment_ids, implementations, semantics="paper"
) -> Pass:
  kind = ReleasedPass if semantics == "released" else Pass
  return kind(
    dtype=jnp.dtype(dtype),
    positions=positions,
    attend=None,
    places=None,
    segment_ids=segment_ids,
    is_step=False,
    implementations=implementations or Implementations(),
  )


def hidden_states(
  config: AttambaConfig,
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
    segment_ids: (B, T) int32 of packed or padded rows, see `ops.segments`;
      padding may stand around texts but not inside.
    dtype: of the work of the layers; None for that of the token table. The
      residual stream, norms, decays and states are float32 in any case.
    implementations: of the ops.
    remat: compute layers again in the backward pass.
    unroll: layers in one iteration of the scan, see `models.transformer`.
  """
  model = bind(config, params)
  positions = transformer.token_positions(tokens)
  dtype = dtype or model.embed.dense().dtype
  shared = _pass(
    dtype, positions, segment_ids, implementations, config.semantics
  )
  return model.read(tokens, shared, remat=remat, unroll=unroll)[0]


def init_state(
  config: AttambaConfig,
  batch: int,
  *,
  cache_size: int,
  dtype: jnp.dtype = jnp.float32,
  state_format: StateFormat | None = None,
  params: Params | None = None,
) -> AttambaState:
  """The state of `batch` rows that have read nothing.

  Args:
    config: of the model.
    batch: rows.
    cache_size: tokens that there is room for, by their chunks.
    dtype: of the passes to come.
    state_format: of recurrent states, which have one format here: None.
    params: of the model, which say nothing of its state.

  Raises:
    InputError: a format is given, or the semantics have no state.
  """
  del params
  _check_state(config, state_format)
  return AttambaState(
    layers=tuple(
      empty_run(config, run, batch, cache_size, dtype) for run in config.runs
    ),
    length=jnp.zeros((batch,), jnp.int32),
  )


def _check_state(
  config: AttambaConfig, state_format: StateFormat | None
) -> None:
  if config.semantics == "released":
    raise InputError(
      "semantics='released' has no state to decode from, as the published code "
      "has none: take a model of semantics='paper'"
    )
  if state_format is not None:
    raise InputError(
      f"state_format={state_format}: Attamba keeps the states of its chunks "
      "in float32: leave it out"
    )


def prefill(
  config: AttambaConfig,
  params: Params,
  tokens: jax.Array,
  *,
  cache_size: int,
  lengths: jax.Array | None = None,
  dtype: jnp.dtype | None = None,
  state_format: StateFormat | None = None,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, AttambaState]:
  """Reads `tokens` (B, T) into a new state.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32.
    cache_size: tokens that the state has room for, at least T.
    lengths: (B,) int32, 1 to T: tokens of each row, the rest of which may be
      anything in range; None for T.
    dtype: of activations and cache; None for that of the token table.
    state_format: of recurrent states, which have one format here: None.
    implementations: of the ops.

  Returns:
    Hidden states (B, T, D) after the final norm, and the state.

  Raises:
    ValueError: the tokens do not fit into the cache.
    InputError: a format of states is given, or the semantics have no state.
  """
  _check_state(config, state_format)
  batch, length = tokens.shape
  if length > cache_size:
    raise ValueError(f"{length} tokens do not fit into {cache_size} slots")
  model = bind(config, params)
  segment_ids = None
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  else:
    slots = jnp.arange(length, dtype=jnp.int32)[None]
    segment_ids = jnp.where(slots < lengths[:, None], 0, -1)
  positions = transformer.token_positions(tokens)
  dtype = dtype or model.embed.dense().dtype
  shared = _pass(dtype, positions, segment_ids, implementations)
  return model.read(tokens, shared, lengths=lengths, cache_size=cache_size)


def decode(
  config: AttambaConfig,
  params: Params,
  tokens: jax.Array,
  state: AttambaState,
  *,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, AttambaState]:
  """Reads `tokens` (B, T), one or a few, behind those of `state`.

  Rows may differ in length. The caller keeps `length + T` within the cache.
  The new state has the shapes and dtypes of the old one and is written in its
  place where the caller donates it.

  Returns:
    Float32 logits (B, T, V) and the longer state.
  """
  model = bind(config, params)
  steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  slots = state.length[:, None] + steps
  shared = _pass(state.dtype, slots, None, implementations)
  hidden, state = model.step(tokens, state, shared)
  return model.logits(hidden), state
