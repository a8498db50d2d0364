"""The layers of `models.attamba`: what makes keys of chunks, and attention.

Shapes by axis letter: B batch, T tokens, L layers of a run, D width, H query
heads, N key/value heads, K head dimension, F = N K channels of keys, M chunks,
C copies of a state space: 2 where its state spans two chunks, else 1. The
residual stream is float32, the work of a layer has the dtype of the pass.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import chunks, layers
from models.attamba_config import AttambaConfig, Run
from models.caches.chunked import ChunkedCache, NewTokens
from models.chunks import Chunks, Texts
from models.mamba_blocks import Mamba2Mixer, Pass, RecurrentState
from models.pooling import Pool, pool
from ops.chunked_attention import UNUSED, chunked_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
  """What the layers of a run remember; one layer's has no axis L.

  Attributes:
    cache: keys and values of chunks and last tokens.
    spaces: states of the state spaces, with C B rows; of keys, and of values
      where those are others. None for other compressors.
    pools: of the open chunk (L, B, 1, F), or of the chunk before it and the
      open one as later chunks weigh them, and the open one (L, B, 3, F). None
      for other compressors.
    opened: (L, B) int32, slot at which the open chunk begins.
    spent: (L, B) int32, costs of its tokens, where they end it.
  """

  cache: ChunkedCache
  spaces: tuple[RecurrentState, ...] | None
  pools: Pool | None
  opened: jax.Array
  spent: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
  """New tokens of one layer behind a state, one text a row.

  Attributes:
    slots: (B, T) int32, consecutive.
    closed: (B, T) bool, tokens at which chunks end.
    begins: (B, T) bool, tokens at which they begin.
    opens: (B, T) int32, slot at which each token's chunk begins.
    number: (B, T) int32, chunks of the row in front of each token's.
    spent: (B,) int32, costs of the chunk that stays open.
  """

  slots: jax.Array
  closed: jax.Array
  begins: jax.Array
  opens: jax.Array
  number: jax.Array
  spent: jax.Array

  @property
  def opened(self) -> jax.Array:
    """(B,) int32, slot at which the chunk begins that stays open."""
    after = self.slots[:, -1] + 1
    return jnp.where(self.closed[:, -1], after, self.opens[:, -1])


def steps(
  config: AttambaConfig,
  run: Run,
  layer: jax.Array,
  slots: jax.Array,
  costs: jax.Array | None,
  state: RunState,
) -> Steps:
  """Where chunks end among new tokens of one layer.

  Args:
    config: of the model.
    run: of the layer.
    layer: its index, an int32 scalar.
    slots: (B, T) int32.
    costs: (B, T) int32 of the tokens, where they end chunks.
    state: of the layer.
  """
  spent = state.spent
  if costs is None:
    closed = chunks.closed_by_place(config, run, layer, slots)
  else:
    open_tokens = slots[:, 0] - state.opened
    closed, _, spent = chunks.closed_by_cost(
      config, run, costs, slots, open_tokens, spent
    )
  first = state.opened == slots[:, 0]
  begins = jnp.concatenate([first[:, None], closed[:, :-1]], axis=1)
  opens = jnp.where(begins, slots, state.opened[:, None])
  before = jnp.sum(state.cache.seen_from < UNUSED, axis=-1, dtype=jnp.int32)
  ended = jnp.cumsum(closed, axis=1, dtype=jnp.int32) - closed
  return Steps(
    slots=slots,
    closed=closed,
    begins=begins,
    opens=jax.lax.cummax(opens, axis=1),
    number=before[:, None] + ended,
    spent=spent,
  )


class ChunkAttention(nnx.Module):
  """Attention to keys of chunks and of the last tokens (Attamba, figure 1)."""

  def __init__(self, config: AttambaConfig, *, rngs: nnx.Rngs):
    """Builds the projections and the compressor."""
    c = self.config = config
    linear = functools.partial(layers.Linear, rngs=rngs)
    q_size = c.num_heads * c.head_dim
    is_ssm = c.compressor == "ssm"
    projects = not is_ssm or c.keep_projections
    project = lambda: linear(c.d_model, c.kv_width) if projects else None
    space = lambda: Mamba2Mixer(c.mixer, rngs=rngs) if is_ssm else None
    self.q_proj = linear(c.d_model, q_size)
    self.k_proj = project()
    self.v_proj = None if c.share_kv else project()
    self.o_proj = linear(q_size, c.d_model)
    self.k_ssm = space()
    self.v_ssm = None if c.share_kv else space()
    width = max(c.most_size(size) for size in c.chunk_sizes)
    channels = c.num_gates * c.kv_width
    self.gate_proj = linear(c.d_model, channels) if channels else None
    self.gate_bias = (
      nnx.Param(jnp.zeros((width, channels))) if channels else None
    )

  def read(
    self,
    x: jax.Array,
    run: Run,
    layout: Chunks,
    texts: Texts,
    shared: Pass,
    lengths: jax.Array | None,
    spent: jax.Array | None,
  ) -> tuple[jax.Array, RunState | None, jax.Array | None]:
    """Maps (B, T, D), many tokens at a time from an empty state.

    Args:
      x: (B, T, D).
      run: of the layer.
      layout: its chunks.
      texts: of the rows.
      shared: what all layers share.
      lengths: (B,) int32, tokens of the rows where a state is wanted.
      spent: (B,) int32, costs of the chunk that stays open.

    Returns:
      (B, T, D); the state behind each row's last token, or None; and what the
      tokens cost other layers (B, T) int32, or None.
    """
    c = self.config
    positions = texts.slots - texts.starts
    spaces = None
    if lengths is not None and c.compressor == "ssm":
      spaces = self.empty_spaces(x.shape[0], x.dtype)
    ids = layout.segment_ids
    if c.semantics == "released":
      # Places within chunks, which differ from text to text.
      ids = (texts.slots - layout.opens + c.most_size(run.size) * texts.starts,)
    k, v, spaces = self._keys(x, ids, layout.copy, spaces, shared)
    chunk_k, chunk_v, pools = None, None, None
    if not chunks.is_shared(c):
      gates = self._gate(x, texts.slots - layout.opens)
      of = functools.partial(self._pool, k, v, gates, run, layout, texts.starts)
      last = jnp.minimum(layout.ends, x.shape[1] - 1)
      chunk_k, chunk_v = of(last)[0].mean(x.dtype)
      if lengths is not None:
        pools = of(lengths[:, None] - 1)[1]
        pools = jax.tree.map(lambda x: x[:, 0], pools)
      at = jnp.take_along_axis(positions, last, axis=1)
      chunk_k = self._rotate(self._heads(chunk_k), at)
      chunk_v = chunk_k if c.share_kv else self._heads(chunk_v)
    q, k = self._heads(self.q_proj(x)), self._heads(k)
    costs = self._costs(x, q, k, run)
    q, k = self._rotate(q, positions), self._rotate(k, positions)
    v = k if c.share_kv else self._heads(v)
    mixed = chunked_attention(
      q,
      k,
      v,
      layout.ends,
      window=c.window,
      chunk_k=chunk_k,
      chunk_v=chunk_v,
      seen_from=layout.seen_from,
      # Where each row is one text, nothing in front of it is to be hidden.
      top=c.top_chunks or None,
      starts=None if shared.segment_ids is None else texts.starts,
      implementation=shared.implementations.chunked,
    )
    y = self._output(mixed, positions)
    if lengths is None:
      return y, None, costs
    cache = self._cache(k, v, chunk_k, chunk_v, layout, lengths)
    opened = _last(layout.opens, lengths)
    opened = jnp.where(_last(layout.closed, lengths), lengths, opened)
    if spent is None:
      spent = jnp.zeros_like(lengths)
    state = RunState(
      cache=cache, spaces=spaces, pools=pools, opened=opened, spent=spent
    )
    return y, state, costs

  def _cache(self, k, v, chunk_k, chunk_v, layout, lengths):
    """What tokens to come see of those that were read, of rotated keys."""
    window = self.config.window
    take = lambda x, at: jnp.take_along_axis(
      x, at[..., None, None], axis=1, mode="clip"
    )
    if chunk_k is None:
      at = jnp.minimum(layout.ends, k.shape[1] - 1)
      chunk_k, chunk_v = take(k, at), take(v, at)
    # A place of the ring holds the last token whose slot leaves it as the
    # remainder; where there is none yet, any token, which `attend` hides.
    ring = jnp.arange(window, dtype=jnp.int32)[None]
    end = lengths[:, None] - 1
    ring = jnp.maximum(end - (end - ring) % max(window, 1), 0)
    own = lambda x: None if self.config.share_kv else x
    return ChunkedCache(
      chunk_k=chunk_k,
      chunk_v=own(chunk_v),
      seen_from=layout.seen_from,
      ring_k=take(k, ring),
      ring_v=own(take(v, ring)),
    )

  def step(
    self,
    x: jax.Array,
    run: Run,
    state: RunState,
    new: Steps,
    shared: Pass,
  ) -> tuple[jax.Array, NewTokens, RunState, jax.Array | None]:
    """Maps (B, T, D), a few tokens behind a state.

    Returns:
      (B, T, D); what the cache gets; the state but for its cache; and what the
      tokens cost other layers (B, T) int32, or None.
    """
    c = self.config
    copies = 2 if c.carry else 1
    of = lambda parity: (
      new.begins & (new.number % 2 == parity) if c.carry else new.begins
    )
    fresh = [of(parity) for parity in range(copies)]
    ids = tuple(jnp.cumsum(x, axis=1, dtype=jnp.int32) for x in fresh)
    copy = (new.number + 1) % 2 if c.carry else None
    spaces = state.spaces
    if spaces is not None:
      # Where a chunk begins at the first new token the state is cleared here,
      # because segments tell only beginnings behind it.
      first = jnp.concatenate([x[:, 0] for x in fresh])
      spaces = jax.tree.map(
        lambda s: jnp.where(
          first.reshape(-1, *(1,) * (s.ndim - 1)), jnp.zeros((), s.dtype), s
        ),
        spaces,
      )
    shared = dataclasses.replace(shared, is_step=x.shape[1] == 1)
    k, v, spaces = self._keys(x, ids, copy, spaces, shared)
    chunk_k, chunk_v, pools = None, None, None
    if not chunks.is_shared(c):
      gates = self._gate(x, new.slots - new.opens)
      chunk_k, chunk_v, pools = self._pool_steps(k, v, gates, state.pools, new)
      chunk_k = self._rotate(self._heads(chunk_k), new.slots)
      chunk_v = None if c.share_kv else self._heads(chunk_v)
    q, k = self._heads(self.q_proj(x)), self._heads(k)
    costs = self._costs(x, q, k, run)
    q = self._rotate(q, new.slots)
    tokens = NewTokens(
      k=self._rotate(k, new.slots),
      v=None if c.share_kv else self._heads(v),
      chunk_k=chunk_k,
      chunk_v=chunk_v,
      closed=new.closed,
      seen_from=chunks.seen_from(c, new.opens, new.slots),
    )
    mixed = state.cache.attend(q, tokens, new.slots, c.top_chunks or None)
    y = self._output(mixed, new.slots)
    return (
      y,
      tokens,
      RunState(
        cache=None,
        spaces=spaces,
        pools=pools,
        opened=new.opened,
        spent=new.spent,
      ),
      costs,
    )

  def empty_spaces(
    self, batch: int, dtype: jnp.dtype
  ) -> tuple[RecurrentState, ...]:
    """States (C B, ...) of state spaces that have read nothing."""
    return tuple(
      empty_space(self.config, (), batch, dtype)
      for _ in range(1 if self.config.share_kv else 2)
    )

  def _keys(self, x, ids, copy, spaces, shared):
    """Keys and values (B, T, F) of the tokens, and the states."""
    c = self.config
    old = spaces or (None, None)
    mix = functools.partial(self._space, x, ids, copy, shared)
    (k, one), (v, two) = (x, None), (x, None)
    if c.compressor == "ssm":
      k, one = mix(self.k_ssm, old[0])
      v, two = (k, None) if c.share_kv else mix(self.v_ssm, old[-1])
    if self.k_proj is not None:
      k = self.k_proj(k)
      v = None if c.share_kv else self.v_proj(v)
    if spaces is None:
      return k, v, None
    return k, v, (one,) if c.share_kv else (one, two)

  def _space(self, x, ids, copy, shared, mixer, state):
    """x + SSM(x) of each chunk, and the state."""
    count = len(ids)
    rows = jnp.concatenate([x] * count) if count > 1 else x
    shared = dataclasses.replace(shared, segment_ids=jnp.concatenate(ids))
    y, new = mixer(rows, state or RecurrentState(), shared)
    if count > 1:
      first, second = jnp.split(y, 2)
      y = jnp.where((copy == 0)[..., None], first, second)
    return x + y, new

  def _costs(self, x, q, k, run):
    """Costs (B, T) of tokens by this layer, some 1 / P each, where it is asked.

    Args:
      x: (B, T, D).
      q: (B, T, H, K), not rotated, which is the same for a token and itself.
      k: (B, T, N, K) alike.
      run: of the layer.
    """
    c = self.config
    if not chunks.finds_costs(c, run):
      return None
    f32 = lambda x: x.astype(jnp.float32)
    if c.boundaries == "first_ssm":
      heads, bias = c.mixer.num_heads, f32(self.k_ssm.dt_bias[...])
      weight = f32(self.k_ssm.in_proj.dense()[:, -heads:])
      dt = jax.nn.softplus(f32(x) @ weight + bias[None, None])
      found = jnp.mean(dt, axis=-1) / jnp.mean(jax.nn.softplus(bias))
    else:
      k = jnp.repeat(f32(k), c.num_heads // c.num_kv_heads, axis=2)
      logits = c.head_dim**-0.5 * jnp.sum(f32(q) * k, axis=-1)
      found = 2 * jax.nn.sigmoid(jnp.mean(logits, axis=-1))
    return chunks.whole_costs(found / run.size)

  def _gate(self, x, places):
    """Logits (B, T, G) of the tokens' weights, each kind's behind the other."""
    if self.gate_proj is None:
      return jnp.zeros((*x.shape[:2], 1), jnp.float32)
    bias = self.gate_bias[...].astype(jnp.float32)[places]
    return self.gate_proj(x, out_dtype=jnp.float32) + bias

  def _pool(self, k, v, gates, run, layout, starts, last):
    """Pools that end at slots `last`, and those that a state keeps."""
    width = self.config.most_size(run.size)
    take = lambda x, at: jnp.take_along_axis(
      x, jnp.maximum(at, 0), axis=1, mode="clip"
    )
    first = take(layout.opens, last)
    of = lambda gates, first, last: pool(k, v, gates, first, last, width)
    if self.config.compressor != "overlapping_gated_pool":
      own = of(gates, first, last)
      return own, jax.tree.map(lambda x: x[:, :, None], own)
    earlier, gates = jnp.split(gates, 2, axis=-1)
    own, later = of(gates, first, last), of(earlier, first, last)
    before = jnp.where(first > take(starts, last), first - 1, -1)
    before = of(earlier, take(layout.opens, before), before)
    return own.merge(before), jax.tree.map(
      lambda *x: jnp.stack(x, axis=2), before, later, own
    )

  def _pool_steps(self, k, v, gates, pools, new):
    """The pools behind each token: means (B, T, F), and those to keep."""

    overlaps = self.config.compressor == "overlapping_gated_pool"

    def step(pools, token):
      k, v, gates, begins = token
      pools = _shifted(pools).where(begins[:, None], pools)
      of = lambda gates: Pool.of_token(k, v, gates)
      part = lambda i: jax.tree.map(lambda x: x[:, i], pools)
      if not overlaps:
        found = part(0).merge(of(gates))
        return jax.tree.map(lambda x: x[:, None], found), found
      earlier, own = jnp.split(gates, 2, axis=-1)
      kept = part(0), part(1).merge(of(earlier)), part(2).merge(of(own))
      pools = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *kept)
      return pools, kept[0].merge(kept[2])

    tokens = k, v, gates, new.begins
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    pools, found = jax.lax.scan(step, pools, tokens)
    found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
    return *found.mean(k.dtype), pools

  def _heads(self, x):
    return x.reshape(*x.shape[:2], -1, self.config.head_dim)

  def _rotate(self, x, positions):
    frequencies = layers.rope_frequencies(
      self.config.head_dim, self.config.rope_theta
    )
    return layers.apply_rope(x, positions, frequencies)

  def _output(self, mixed, positions):
    if self.config.share_kv:
      mixed = self._rotate(mixed, -positions)
    return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))


def _last(x: jax.Array, lengths: jax.Array) -> jax.Array:
  """x (B, T) at each row's last token."""
  return jnp.take_along_axis(x, lengths[:, None] - 1, axis=1)[:, 0]


def _shifted(pools: Pool) -> Pool:
  """The pools (B, 1 or 3, F) as a new chunk begins."""
  nothing = jax.tree.map(lambda x: x[:, :1], pools)
  nothing = Pool.empty(
    nothing.k.shape, nothing.total.shape[-1], values=nothing.v is not None
  )
  if pools.k.shape[1] == 1:
    return nothing
  before = jax.tree.map(lambda x: x[:, 1:2], pools)
  return jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1), before, nothing, nothing
  )


def empty_space(
  config: AttambaConfig, rows: tuple[int, ...], batch: int, dtype: jnp.dtype
) -> RecurrentState:
  """The state of state spaces that have read nothing: (*rows, C B, ...)."""
  mixer = config.mixer
  rows = (*rows, (2 if config.carry else 1) * batch)
  conv = (*rows, mixer.d_conv - 1, mixer.conv_channels)
  ssm = (*rows, mixer.num_heads, mixer.head_dim, mixer.d_state)
  return RecurrentState(
    conv=jnp.zeros(conv, dtype), ssm=jnp.zeros(ssm, jnp.float32)
  )


def empty_run(
  config: AttambaConfig, run: Run, batch: int, cache_size: int, dtype: jnp.dtype
) -> RunState:
  """The state of a run whose rows have read nothing."""
  c, rows = config, (run.num_layers, batch)
  spaces, pools = None, None
  if c.compressor == "ssm":
    spaces = tuple(
      empty_space(c, rows[:1], batch, dtype)
      for _ in range(1 if c.share_kv else 2)
    )
  elif not chunks.is_shared(c):
    shape = (*rows, 3 if c.num_gates == 2 else 1, c.kv_width)
    channels = c.kv_width if c.num_gates else 1
    pools = Pool.empty(shape, channels, values=not c.share_kv)
  opened, spent = (jnp.zeros(rows, jnp.int32) for _ in range(2))
  return RunState(
    cache=ChunkedCache.empty(
      rows,
      c.most_chunks(run.size, cache_size),
      c.window,
      (c.num_kv_heads, c.head_dim),
      dtype,
      share_kv=c.share_kv,
    ),
    spaces=spaces,
    pools=pools,
    opened=opened,
    spent=spent,
  )


class Block(nnx.Module):
  """Pre-norm residual block."""

  def __init__(self, config: AttambaConfig, *, rngs: nnx.Rngs):
    """Builds attention, MLP and their norms."""
    self.attn_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.attn = ChunkAttention(config, rngs=rngs)
    self.mlp_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.mlp = layers.GatedMlp(config.d_model, config.d_ff, rngs=rngs)
    for written in (self.attn.o_proj, self.mlp.down_proj):
      written.rescale((2 * config.num_layers) ** -0.5)

  def __call__(
    self, x: jax.Array, shared: Pass, attend: Any
  ) -> tuple[jax.Array, Any]:
    """Maps the stream (B, T, D); `attend` is a method of `attn`."""
    y, *rest = attend(self.attn, self.attn_norm(x, dtype=shared.dtype))
    x = x + y
    return x + self.mlp(self.mlp_norm(x, dtype=shared.dtype)), rest
