"""Plain decoding: one token a step, drawn from the model's distribution."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from models import language_model
from models.caches.paged import PageBudget
from models.implementations import Implementations
from models.state_format import StateFormat
from research.decoding import loop
from research.decoding.sampling import Sampling, draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """Where a batch stands.

  Attributes:
    model: its state behind all tokens but the last one drawn.
    tokens: (B,) int32, the last ones drawn.
    keys: (B,) keys, one a row, so that what a row draws does not depend on the
      others; or one () for the whole batch.
    count: () int32, tokens drawn so far; token n is drawn by the key folded
      with n, however many steps a call makes.
  """

  model: language_model.State
  tokens: jax.Array
  keys: jax.Array
  count: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
  """Ancestral, greedy or truncated sampling; see `loop.Method`.

  Attributes:
    config: of the model.
    sampling: how tokens are drawn.
    vocab_size: ids at or above it are never drawn; None allows all. Token
      tables may have more rows than the tokenizer has ids.
    state_format: of recurrent states, as `language_model.prefill` takes it.
    pages: how much of a Transformer's cache tokens read; None for all.
    implementations: of the ops of a step; None for the best that run.
  """

  width: ClassVar[int] = 1

  config: language_model.Config
  sampling: Sampling
  vocab_size: int | None = None
  state_format: StateFormat | None = None
  pages: PageBudget | None = None
  implementations: Implementations | None = None

  def begin(
    self,
    params: language_model.Params,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    cache_size: int,
  ) -> tuple[jax.Array, jax.Array, State]:
    """Reads prompts (B, T) of `lengths` (B,) and draws one token of each."""
    hidden, state = language_model.prefill(
      self.config,
      params,
      tokens,
      lengths,
      cache_size=cache_size,
      state_format=self.state_format,
    )
    if self.pages is not None:
      state = language_model.with_pages(self.config, state, self.pages)
    last = hidden[jnp.arange(len(tokens)), lengths - 1]
    scores = language_model.logits(self.config, params, last)
    return self._drawn(scores, state, keys, jnp.zeros((), jnp.int32))

  def step(
    self, params: language_model.Params, state: State
  ) -> tuple[jax.Array, jax.Array, State]:
    """Draws the next token of every row."""
    scores, model = language_model.decode(
      self.config,
      params,
      state.tokens[:, None],
      state.model,
      implementations=self.implementations,
    )
    return self._drawn(scores[:, 0], model, state.keys, state.count)

  def _drawn(self, scores, model, keys, count):
    fold = jax.random.fold_in
    fold = jax.vmap(fold, in_axes=(0, None)) if keys.ndim else fold
    scores = scores[:, : self.vocab_size]
    tokens = draw(fold(keys, count), scores, self.sampling)
    tokens = jnp.where(jnp.isfinite(scores.max(-1)), tokens, loop.BROKEN)
    state = State(model=model, tokens=tokens, keys=keys, count=count + 1)
    return tokens[:, None], jnp.ones_like(tokens), state
