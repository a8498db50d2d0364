"""The device's half of generating text: one prefill, then one decode step.

Both are compiled once for a batch shape. Tokens are drawn on the device, and
the state is donated, so a step moves B integers to the host and no cache.
Shapes by axis letter: B batch, T tokens, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from models import language_model
from research.decoding import sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """What is drawn, and when a row ends.

  Attributes:
    sampling: how tokens are drawn.
    end_ids: tokens after which a row is done.
    vocab_size: ids at or above it are never drawn; None allows all. Token
      tables may have more rows than the tokenizer has ids.
  """

  sampling: sampling.Sampling
  end_ids: tuple[int, ...] = ()
  vocab_size: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """A batch in the midst of being continued.

  Attributes:
    state: of the model, behind all tokens but the last one drawn.
    tokens: (B,) int32, the last ones drawn.
    done: (B,) bool, rows that have drawn an end token; they repeat it.
    keys: (B,) keys, one a row: what a row draws does not depend on the others.
    count: () int32, tokens drawn so far; token n of a row is drawn by its key
      folded with n, however many steps a call makes.
  """

  state: language_model.State
  tokens: jax.Array
  done: jax.Array
  keys: jax.Array
  count: jax.Array


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("cache_size", "rules")
)
def begin(
  config: language_model.Config,
  params: language_model.Params,
  tokens: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  *,
  cache_size: int,
  rules: Rules,
) -> tuple[Generation, jax.Array]:
  """Reads the prompts and draws the first token of each.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32 prompts, padded on the right.
    lengths: (B,) int32, 1 to T.
    keys: (B,) keys.
    cache_size: prompt and continuation together have at most so many tokens.
    rules: of drawing.

  Returns:
    The batch, and the tokens drawn (B, 1).
  """
  hidden, state = language_model.read(
    config, params, tokens, lengths, cache_size=cache_size
  )
  rows = jnp.arange(tokens.shape[0])
  scores = language_model.logits(config, params, hidden[rows, lengths - 1])
  count = jnp.zeros((), jnp.int32)
  drawn = _draw(scores, keys, count, rules)
  batch = Generation(
    state=state,
    tokens=drawn,
    done=_ends(drawn, rules),
    keys=keys,
    count=count + 1,
  )
  return batch, drawn[:, None]


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("steps", "rules"),
  donate_argnums=2,
)
def advance(
  config: language_model.Config,
  params: language_model.Params,
  batch: Generation,
  *,
  steps: int,
  rules: Rules,
) -> tuple[Generation, jax.Array]:
  """Draws `steps` more tokens of every row; takes the memory of `batch`.

  Returns:
    The batch, and the tokens drawn (B, steps).
  """

  def step(batch: Generation, _):
    scores, state = language_model.append(
      config, params, batch.tokens[:, None], batch.state
    )
    drawn = _draw(scores[:, 0], batch.keys, batch.count, rules)
    drawn = jnp.where(batch.done, batch.tokens, drawn)
    following = Generation(
      state=state,
      tokens=drawn,
      done=batch.done | _ends(drawn, rules),
      keys=batch.keys,
      count=batch.count + 1,
    )
    return following, drawn

  batch, drawn = jax.lax.scan(step, batch, length=steps)
  return batch, drawn.T


def _draw(
  scores: jax.Array, keys: jax.Array, count: jax.Array, rules: Rules
) -> jax.Array:
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)
  return sampling.draw(keys, scores[:, : rules.vocab_size], rules.sampling)


def _ends(tokens: jax.Array, rules: Rules) -> jax.Array:
  if not rules.end_ids:
    return jnp.zeros(tokens.shape, bool)
  return jnp.isin(tokens, jnp.asarray(rules.end_ids, jnp.int32))
