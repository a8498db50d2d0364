"""Where the chunks of texts end, and what is seen of them when.

Shapes by axis letter: B batch, S tokens, M chunks of a row, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from models.attamba_config import (
  BY_LAYER,
  BY_TOKEN,
  SHARED,
  AttambaConfig,
  Run,
)
from ops import segments
from ops.chunked_attention import UNUSED

# Costs of tokens are whole multiples of a chunk's, divided by it: sums are then
# exact, and the same in one pass and token by token.
COST_OF_CHUNK = 1 << 12


def token_costs(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Costs (B, S) int32 of tokens.

  Args:
    table: (V,) shares of a chunk, 0 to 1.
    tokens: (B, S) int32.
  """
  return whole_costs(table)[tokens]


def whole_costs(shares: jax.Array) -> jax.Array:
  """Shares of a chunk (...), 0 to 1, as costs (...) int32."""
  shares = jnp.clip(lax.stop_gradient(shares).astype(jnp.float32), 0, 1)
  return jnp.round(COST_OF_CHUNK * shares).astype(jnp.int32)


def closed_by_place(
  config: AttambaConfig, run: Run, layer: jax.Array, places: jax.Array
) -> jax.Array:
  """Whether a chunk ends at a place of a text, where that alone decides.

  Args:
    config: of the model.
    run: of the layer.
    layer: its index, an int32 scalar.
    places: (B, S) int32, tokens of the text in front.

  Returns:
    (B, S) bool.
  """
  size = run.size
  if config.compressor == "none":
    return (places == 0) & config.sink
  if config.boundaries in ("uniform", *BY_LAYER):
    closed = places % size == size - 1
  elif config.boundaries == "cyclic":
    earlier = (layer * size) // config.num_layers
    if config.semantics == "released":
      earlier = jnp.minimum(layer * (size // config.num_layers), size - 1)
    closed = (places + earlier) % size == size - 1
  else:
    drawn = _hash(places // size, layer, config.seed) % jnp.uint32(size)
    closed = places % size == drawn.astype(jnp.int32)
  return closed | (places == 0) if config.sink else closed


def _hash(block, layer, seed):
  """32 bits that depend on all three, by the finalizer of MurmurHash3."""
  x = block.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
  x = x + jnp.uint32(layer) * jnp.uint32(0x85EBCA77)
  x = x + jnp.uint32(seed % 2**32)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x


def closed_by_cost(
  config: AttambaConfig,
  run: Run,
  costs: jax.Array,
  places: jax.Array,
  open_tokens: jax.Array,
  spent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The same for boundaries by token, one token after the other.

  Args:
    config: of the model.
    run: of the layer.
    costs: (B, S) of `token_costs`.
    places: (B, S) int32, tokens of the text in front; -1 for padding.
    open_tokens: (B,) int32, tokens of the open chunk in front of these.
    spent: (B,) int32, the sum of their costs.

  Returns:
    (B, S) bool, and the open chunk behind the tokens as the last two arguments
    have it.
  """
  least, most = config.least_size(run.size), config.most_size(run.size)
  # What a chunk cost in excess counts for the next, so that they have P tokens
  # on average; but a second full stop does not end another one.
  rest = 0 if config.boundaries == "token_class" else 1

  def step(carry, token):
    count, spent = carry
    cost, place = token
    first = place == 0
    new_count = jnp.where(first, 0, count) + 1
    new_spent = jnp.where(first, 0, spent) + cost
    is_full = (new_spent >= COST_OF_CHUNK) & (new_count >= least)
    closed = (new_count >= most) | is_full
    if config.sink:
      closed = closed | first
    kept = (
      jnp.where(closed, 0, new_count),
      jnp.where(
        closed, jnp.maximum(rest * (new_spent - COST_OF_CHUNK), 0), new_spent
      ),
    )
    both = zip(carry, kept)
    return tuple(jnp.where(place < 0, *pair) for pair in both), closed

  carry, closed = lax.scan(step, (open_tokens, spent), (costs.T, places.T))
  return closed.T, *carry


def by_token(config: AttambaConfig) -> bool:
  """Whether the tokens themselves decide where chunks end."""
  return config.boundaries in BY_TOKEN and config.compressor != "none"


def finds_costs(config: AttambaConfig, run: Run) -> bool:
  """Whether a run is the layer that finds what tokens cost the others."""
  is_first = run.start == 0 and config.compressor != "none"
  return is_first and config.boundaries in BY_LAYER


def is_shared(config: AttambaConfig) -> bool:
  """Whether a chunk's key is that of its last token."""
  return config.compressor in SHARED


def seen_from(
  config: AttambaConfig, opens: jax.Array, ends: jax.Array
) -> jax.Array:
  """First slots whose tokens see chunks that open and end at such slots.

  A chunk is seen as soon as the window no longer shows what stands for it: its
  last token, or else any of its tokens.

  Args:
    config: of the model.
    opens: (B, S) int32.
    ends: (B, S) int32.
  """
  if is_shared(config):
    return ends + config.window + 1
  return jnp.maximum(opens + config.window, ends) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
  """The texts of rows that are read in one pass.

  Attributes:
    slots: (1, S) int32.
    starts: (B, S) int32, slot at which each token's text begins.
    ends: (B, S) int32, slot of its last token.
    padding: (B, S) bool, or None for none.
  """

  slots: jax.Array
  starts: jax.Array
  ends: jax.Array
  padding: jax.Array | None

  @classmethod
  def of(cls, shape: tuple[int, int], segment_ids: jax.Array | None) -> "Texts":
    """Texts of rows (B, S), one each or as `ops.segments` tells them apart."""
    slots = jnp.arange(shape[1], dtype=jnp.int32)[None]
    if segment_ids is None:
      starts = jnp.zeros(shape, jnp.int32)
      ends = jnp.full(shape, shape[1] - 1, jnp.int32)
      return cls(slots=slots, starts=starts, ends=ends, padding=None)
    padding = segments.is_padding(segment_ids)
    # The first text of a row begins behind the padding in front of it.
    first = jnp.argmax(~padding, axis=1).astype(jnp.int32)[:, None]
    begins = segments.resets(segment_ids) | (slots == first)
    starts = lax.cummax(jnp.where(begins, slots, 0), axis=1)
    after = jnp.roll(begins | padding, -1, axis=1).at[:, -1].set(True)
    last = jnp.where(after & ~padding, slots, shape[1])
    ends = lax.cummin(last, axis=1, reverse=True)
    return cls(slots=slots, starts=starts, ends=ends, padding=padding)

  @property
  def places(self) -> jax.Array:
    """(B, S) int32, tokens of the text in front; -1 for padding."""
    places = self.slots - self.starts
    if self.padding is None:
      return places
    return jnp.where(self.padding, -1, places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
  """The chunks of one layer of rows that are read in one pass.

  Attributes:
    closed: (B, S) bool, the tokens at which chunks end.
    opens: (B, S) int32, slot at which each token's chunk begins.
    ends: (B, M) int32, slots of the last tokens of the chunks that are kept;
      `UNUSED` behind them.
    seen_from: (B, M) int32, first slots that see them.
    segment_ids: one or two of (B, S) int32: where state spaces begin anew, as
      `ops.segments` has it. Of two, each spans two chunks.
    copy: (B, S) int32, which of two has a chunk and the one before it.
  """

  closed: jax.Array
  opens: jax.Array
  ends: jax.Array
  seen_from: jax.Array
  segment_ids: tuple[jax.Array, ...]
  copy: jax.Array | None


def most_kept(config: AttambaConfig, run: Run, length: int) -> int:
  """M for rows of several texts: chunks that a token of their text may see.

  Such a text has L + 2 tokens at least, and of each there is one chunk in
  excess of those of its length, and that of its first token.
  """
  texts = length // (config.window + 2)
  if config.compressor == "none":
    return min((texts + 1) * config.sink, length)
  return min(length // config.least_size(run.size) + 2 * texts + 2, length)


def find(
  config: AttambaConfig,
  closed: jax.Array,
  texts: Texts,
  most: int,
  *,
  keep_all: bool,
) -> Chunks:
  """Lays out the chunks that end where `closed`.

  Args:
    config: of the model.
    closed: (B, S) bool.
    texts: of the rows.
    most: M.
    keep_all: also those that no token of these rows sees, for tokens to come.
  """
  slots, shape = texts.slots, closed.shape
  padding = texts.padding
  if padding is not None:
    closed = closed & ~padding
  begins = (slots == texts.starts) | jnp.roll(closed, 1, axis=1)
  opens = lax.cummax(jnp.where(begins, slots, 0), axis=1)
  seen = jnp.broadcast_to(seen_from(config, opens, slots), shape)
  kept = closed if keep_all else closed & (seen <= texts.ends)
  rank = jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1
  rows = jnp.arange(shape[0])[:, None]
  place = lambda values: (
    jnp.full((shape[0], most), UNUSED, jnp.int32)
    .at[rows, jnp.where(kept, rank, most)]
    .set(jnp.broadcast_to(values, shape), mode="drop")
  )
  ids, copy = _segments(config, begins, texts)
  return Chunks(
    closed=closed,
    opens=opens,
    ends=place(slots),
    seen_from=place(seen),
    segment_ids=ids,
    copy=copy,
  )


def _segments(config, begins, texts):
  """Segments of the state spaces, and which of two copies counts."""
  of = lambda begins: jnp.cumsum(begins, axis=1, dtype=jnp.int32)
  mask = lambda ids: (
    ids if texts.padding is None else jnp.where(texts.padding, -1, ids)
  )
  whole = of(begins)
  if not config.carry:
    return (mask(whole),), None
  # Chunks of the text in front.
  number = whole - jnp.take_along_axis(whole, texts.starts, axis=1)
  first = texts.slots == texts.starts
  ids = tuple(
    mask(of(first | (begins & (number % 2 == parity)))) for parity in (0, 1)
  )
  return ids, (number + 1) % 2
