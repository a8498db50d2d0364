"""The dense part of an episode: what the frozen LLM knows before it starts.

Axis letters: W windows of text, S prefix tokens, L layers, N key/value heads,
K head dimension, D width, P pages, R rollouts of a window, T steps of an
episode.

A prefix is computed once for a window and shared, unrepeated, by all its
rollouts: K counterfactual schedules of one episode, several episodes that
start at different tokens of the window, several budgets, or all of these.
A rollout that starts at token s sees the first s tokens of the prefix: the
published refresh (dense replay at the start of every episode) is exactly
this.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import ops
from models import transformer
from models.attention import causal_attend
from models.transformer_config import TransformerConfig

# Tokens over which the running mean of the surprise is taken.
MEAN_SPAN = 32
# Arrays of a prefix whose first axis is the layer, the second the window.
_BY_LAYER = ("k", "v", "page_min", "page_max")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
  """Dense state of W windows.

  Attributes:
    k: (L, W, S, N, K) keys of every layer.
    v: (L, W, S, N, K).
    page_min: (L, W, P, N, K) lower bound of the keys of each page, or None
      when no action drops tokens.
    page_max: (L, W, P, N, K) upper bound, or None.
    hidden: (W, S, D) last hidden states, after the final norm.
    surprise: (W, S), -log p(token i+1 | tokens <= i) in nats at index i;
      zero before the first position that an episode can ask for.
    entropy: (W, S) of the logits at each position, in nats; likewise.
  """

  k: jax.Array
  v: jax.Array
  page_min: jax.Array | None
  page_max: jax.Array | None
  hidden: jax.Array
  surprise: jax.Array
  entropy: jax.Array

  def take(self, rows: jax.Array) -> "Prefix":
    """The prefixes of some windows, by their rows (n,)."""
    chosen = {
      name: x if x is None else x[:, rows] if name in _BY_LAYER else x[rows]
      for name, x in vars(self).items()
    }
    return Prefix(**chosen)

  @classmethod
  def join(cls, pieces: Sequence["Prefix"]) -> "Prefix":
    """The prefixes of the windows of all pieces, in their order."""
    joined = {}
    for name in vars(pieces[0]):
      parts = [getattr(piece, name) for piece in pieces]
      axis = int(name in _BY_LAYER)
      joined[name] = None if parts[0] is None else jnp.concatenate(parts, axis)
    return cls(**joined)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStats:
  """What the logits say of the next token, in nats, float32, (...).

  Attributes:
    log_p: log-likelihood of the true token.
    entropy: of the logits.
    divergence: of the dense model's distribution from this one (KL), or None
      where no dense model was asked.
  """

  log_p: jax.Array
  entropy: jax.Array
  divergence: jax.Array | None = None


def token_stats(
  logits: jax.Array, targets: jax.Array, dense: jax.Array | None = None
) -> TokenStats:
  """Statistics of `logits` (..., V) for the true tokens `targets` (...).

  Args:
    logits: (..., V).
    targets: (...).
    dense: the dense model's logits, which broadcast to `logits`, or None.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  # H = log Z - E[logit]: one pass, no array of log-probabilities is kept.
  centred = logits - log_z[..., None]
  entropy = -jnp.sum(jnp.exp(centred) * centred, axis=-1)
  divergence = None
  if dense is not None:
    dense = jax.nn.log_softmax(dense, axis=-1)
    divergence = jnp.sum(jnp.exp(dense) * (dense - centred), axis=-1)
  return TokenStats(
    log_p=picked - log_z, entropy=entropy, divergence=divergence
  )


@functools.partial(
  jax.jit,
  static_argnames=("config", "first_start", "page_size", "chunk", "attention"),
)
def build(
  config: TransformerConfig,
  params: transformer.Params,
  tokens: jax.Array,
  *,
  first_start: int,
  page_size: int | None,
  chunk: int = 64,
  attention: str | None = None,
) -> Prefix:
  """Reads the windows densely; compiled once for set-ups of any actions.

  Args:
    config: of the frozen LLM.
    params: of the frozen LLM.
    tokens: (W, S + 1) int32; the last token is only a target.
    first_start: the smallest start of any episode; logits are computed from
      `first_start - MEAN_SPAN` on.
    page_size: of the key pages, or None when no action drops tokens.
    chunk: positions whose logits (W, chunk, V) are alive at a time.
    attention: implementation of `jax.nn.dot_product_attention`.

  Returns:
    The prefix over the first S tokens.

  Raises:
    ValueError: S is no multiple of the page size.
  """
  read, targets = tokens[:, :-1], tokens[:, 1:]
  windows, length = read.shape
  if page_size is not None and length % page_size:
    raise ValueError(
      f"a prefix of {length} tokens is no multiple of page_size={page_size}"
    )
  model = transformer.bind(config, params)
  hidden, (k, v) = model(
    model.embed(read),
    transformer.token_positions(read),
    causal_attend(implementation=attention),
  )
  first = max(first_start - MEAN_SPAN, 0)
  stats = stats_in_chunks(
    model, hidden[:, first:, None], targets[:, first:, None], chunk
  )
  surprise, entropy = -stats.log_p[:, :, 0], stats.entropy[:, :, 0]
  fill = ((0, 0), (first, 0))
  page_min = page_max = None
  if page_size is not None:
    page_min, page_max = ops.page_bounds(k, page_size=page_size)
  return Prefix(
    k=k,
    v=v,
    page_min=page_min,
    page_max=page_max,
    hidden=hidden,
    surprise=jnp.pad(surprise, fill),
    entropy=jnp.pad(entropy, fill),
  )


def stats_in_chunks(
  model: transformer.Transformer,
  hidden: jax.Array,
  targets: jax.Array,
  chunk: int,
  dense: jax.Array | None = None,
) -> TokenStats:
  """Statistics (W, n, K) without (W, n, K, V) logits at once.

  Args:
    model: the frozen LLM.
    hidden: (W, n, K, D) hidden states, K of each place in the text.
    targets: (W, n, K) tokens that follow them.
    chunk: hidden states of a window whose logits are alive at a time.
    dense: (W, n, D) hidden states of the dense model, or None.
  """
  length, per_place = hidden.shape[1:3]
  chunk = min(max(chunk // per_place, 1), length)
  pad = -length % chunk

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def one(piece):
    h, y, d = piece
    beside = None if d is None else model.logits(d)[:, :, None]
    return token_stats(model.logits(h), y, beside)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, per_place)[:, :length]

  pieces = jax.tree.map(cut, (hidden, targets, dense))
  return jax.tree.map(join, jax.lax.map(one, pieces))


def at_starts(values: jax.Array, starts: jax.Array) -> jax.Array:
  """Picks `values` (W, S, ...) just before `starts` (W, R): (W, R, ...)."""
  index = (starts - 1).reshape(starts.shape + (1,) * (values.ndim - 2))
  return jnp.take_along_axis(values, index, axis=1)


def mean_surprise(prefix: Prefix, starts: jax.Array) -> jax.Array:
  """Mean surprise of the MEAN_SPAN tokens that end at each start (W, R)."""
  total = jnp.cumsum(prefix.surprise, axis=1)
  total = jnp.pad(total, ((0, 0), (1, 0)))
  begin = jnp.maximum(starts - MEAN_SPAN, 0)
  span = jnp.take_along_axis(total, starts, axis=1) - jnp.take_along_axis(
    total, begin, axis=1
  )
  return span / (starts - begin)


def episode_tokens(
  tokens: jax.Array, starts: jax.Array, horizon: int
) -> tuple[jax.Array, jax.Array]:
  """Inputs and targets (W, R, T) of episodes that start at `starts` (W, R)."""
  steps = jnp.arange(horizon + 1, dtype=starts.dtype)
  index = starts[..., None] + steps[None, None]
  windows, rollouts, _ = index.shape
  picked = jnp.take_along_axis(tokens, index.reshape(windows, -1), axis=1)
  picked = picked.reshape(windows, rollouts, horizon + 1)
  return picked[..., :-1], picked[..., 1:]
