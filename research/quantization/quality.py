"""What quantizing costs where a model runs for long: token after token.

A pass over a whole text never rounds a recurrent state between tokens; decoding
does so at every one. One program reads texts and draws others beside them, so
that a recipe is compiled once for both. Shapes by axis letter: B rows, T
tokens, V vocabulary, K positions.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import errors, language_model
from models.module import Params
from research.decoding.sampling import Sampling, draw

Model = tuple[language_model.Config, Params]
# Positions over which a divergence at a token is averaged.
_WIDTH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """What a model says of texts, one token after the other.

  Attributes:
    tokens: (B, T) int32, those that it drew among them.
    nll: (B, T - 1) float32, of every token but the first behind those before
      it, in nats.
    kept: (K, R, V) float32 log-probabilities of the tokens behind positions
      that were asked for, of the first R rows.
  """

  tokens: np.ndarray
  nll: np.ndarray
  kept: np.ndarray


def read(
  model: Model,
  tokens: np.ndarray,
  *,
  free: np.ndarray | None = None,
  prompt: int = 1,
  seed: int = 0,
  keep: Sequence[int] = (),
  rows: int = 0,
) -> Reading:
  """Decodes texts, and goes on with some rows by tokens that the model draws.

  Args:
    model: config and parameters.
    tokens: (B, T) int32.
    free: (B,) bool, rows that the model goes on with behind their prompts,
      whatever is in `tokens` there; None for no row.
    prompt: tokens of a prompt.
    seed: of the draws, from the model's own distribution.
    keep: positions whose log-probabilities are kept.
    rows: R, of which they are kept.

  Raises:
    InputError: the logits are not finite.
  """
  free = np.zeros(len(tokens), bool) if free is None else free
  drawn, nll, kept, finite = jax.device_get(
    _read(
      *model,
      jnp.asarray(tokens),
      jnp.asarray(free),
      jax.random.key(seed),
      prompt=prompt,
      keep=tuple(keep),
      rows=rows,
    )
  )
  if not finite:
    raise errors.not_finite()
  return Reading(tokens=drawn, nll=nll, kept=kept)


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("prompt", "keep", "rows")
)
def _read(config, params, tokens, free, key, *, prompt, keep, rows):
  count, size = tokens.shape
  state = language_model.init_state(
    config,
    count,
    cache_size=size,
    dtype=params["embed"]["table"].dtype,
    params=params,
  )
  # What nobody asked for is written to a place behind the last, and cut off.
  slots = np.full(size - 1, len(keep), np.int32)
  slots[list(keep)] = np.arange(len(keep))
  scores = jnp.zeros((rows, config.vocab_size), jnp.float32)
  kept = jnp.broadcast_to(scores, (len(keep) + 1, *scores.shape))

  def step(carry, at):
    token, state, kept, finite = carry
    given, slot, place = at
    logits, state = language_model.decode(config, params, token[:, None], state)
    scores = jax.nn.log_softmax(logits[:, 0, : config.vocab_size])
    finite &= jnp.isfinite(scores).all()
    own = draw(jax.random.fold_in(key, place), scores, Sampling())
    token = jnp.where(free & (place >= prompt), own, given)
    nll = -jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
    kept = kept.at[slot].set(scores[:rows])
    return (token, state, kept, finite), (token, nll)

  start = tokens[:, 0], state, kept, jnp.bool_(True)
  places = jnp.arange(1, size)
  (_, _, kept, finite), (rest, nll) = jax.lax.scan(
    step, start, (tokens[:, 1:].T, jnp.asarray(slots), places)
  )
  drawn = jnp.concatenate([tokens[:, :1], rest.T], axis=1)
  return drawn, nll.T, kept[:-1], finite


@jax.jit
def divergence(first: jax.Array, second: jax.Array) -> jax.Array:
  """Kullback-Leibler divergence of the second from the first, in nats.

  Args:
    first: (..., V) log-probabilities of the model that is compared with.
    second: (..., V) those of the other.

  Returns:
    (...) float32.
  """
  return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def repetition(tokens: np.ndarray, length: int = 4) -> np.ndarray:
  """Share of runs of `length` tokens that a row (B, T) had before, (B,)."""
  shares = []
  for row in tokens:
    runs = [tuple(row[i : i + length]) for i in range(len(row) - length + 1)]
    shares.append(1 - len(set(runs)) / len(runs))
  return np.asarray(shares)


def near(token: int) -> range:
  """The positions whose divergences are averaged: the last up to a token."""
  return range(max(0, token - _WIDTH), token)
