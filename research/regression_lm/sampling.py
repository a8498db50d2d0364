"""Draws of numbers: the text read once, all draws of all texts in one scan.

Shapes by axis letter: B texts, L text tokens, S draws a text, T target tokens,
O objectives.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import regression_lm
from models.errors import InputError
from models.numbers import MISSING, START
from models.regression_lm import Params
from research.decoding.sampling import Sampling
from research.decoding.sampling import draw as draw_tokens
from research.regression_lm import expected, likelihood
from research.regression_lm.likelihood import Model
from research.regression_lm.token_batches import Texts
from research.text import buckets

# Text tokens and draws of one call: on a CPU, and at least on others. The share
# of an accelerator's memory that one call is given.
_CALL_TOKENS, _CALL_DRAWS, _SHARE = 1 << 15, 1 << 14, 0.4


@functools.partial(
  jax.jit, static_argnames=("model", "num_samples", "sampling")
)
def draw(
  model: Model,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  *,
  num_samples: int,
  sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
  given: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws targets from the model's distribution over the grammar.

  A text's draws depend on its own key alone, not on the texts beside it.

  Args:
    model: the model.
    params: of it.
    tokens: (B, L) int32.
    lengths: (B,) int32, 1 to L.
    keys: (B,) one for each text.
    num_samples: S.
    sampling: temperature, top-k and top-p of every token, counted after the
      grammar.
    given: (B, T) int32 tokens that are known (`MISSING` among them); `START`
      where one is to be drawn. Later objectives are then drawn given earlier
      ones; those in front of a given one do not know of it.

  Returns:
    Ids (B, S, T) int32, and the log-probability of every row by the model as
    it is, temperature 1: (B, S) float32, of the tokens that were drawn.
  """
  config, length = model.config, model.codec.length
  batch, table = tokens.shape[0], model.next_state()
  memory = regression_lm.encode(
    config, params, tokens, lengths, compute=model.compute
  )
  if given is None:
    given = jnp.full((batch, length), START, jnp.int32)

  def step(carry, place_and_known):
    token, state, cache, logprob = carry
    place, known = place_and_known
    logits, cache = regression_lm.step(
      config, params, memory, token, cache, compute=model.compute
    )
    logits = likelihood.restrict(table, state, logits)
    draw_keys = jax.vmap(
      lambda key: jax.random.split(jax.random.fold_in(key, place), num_samples)
    )(keys)
    drawn = draw_tokens(
      draw_keys.reshape(-1), logits.reshape(batch * num_samples, -1), sampling
    ).reshape(batch, num_samples)
    free = jnp.broadcast_to((known == START)[:, None], drawn.shape)
    token = jnp.where(free, drawn, known[:, None])
    gain = jnp.take_along_axis(
      jax.nn.log_softmax(logits), drawn[..., None], axis=-1
    )[..., 0]
    state = jnp.maximum(table[state, token], 0)
    logprob = logprob + jnp.where(free, gain, 0.0)
    return (token, state, cache, logprob), token

  shape = (batch, num_samples)
  carry = (
    jnp.full(shape, START, jnp.int32),
    jnp.zeros(shape, jnp.int32),
    regression_lm.init_cache(
      config, batch, num_samples, dtype=model.compute.dtype
    ),
    jnp.zeros(shape, jnp.float32),
  )
  places = jnp.arange(length, dtype=jnp.int32)
  (_, _, _, logprob), ids = jax.lax.scan(step, carry, (places, given.T))
  return jnp.moveaxis(ids, 0, -1), logprob


def draw_texts(
  model: Model,
  params: Params,
  texts: Texts,
  keys: jax.Array,
  *,
  num_samples: int,
  sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
  given: np.ndarray | None = None,
) -> np.ndarray:
  """Draws for any number of texts, in as few calls as memory allows.

  Args:
    model: the model.
    params: of it.
    texts: N texts.
    keys: (N,) one for each.
    num_samples: S.
    sampling: as for `draw`.
    given: (N, T) as for `draw`.

  Returns:
    Ids (N, S, T) int32.
  """
  pending = []
  for indices, filled, batch in calls(model, texts, num_samples):
    ids, _ = draw(
      model,
      params,
      *batch,
      keys[filled],
      num_samples=num_samples,
      sampling=sampling,
      given=None if given is None else given[filled],
    )
    pending.append((indices, ids))
  shape = (len(texts.lengths), num_samples, model.codec.length)
  found = np.empty(shape, np.int32)
  # Fetched when all are under way, so that no call waits for the host.
  for indices, ids in pending:
    found[indices] = np.asarray(ids)[: len(indices)]
  return found


def calls(
  model: Model, texts: Texts, rows_a_text: int
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
  """Calls of few shapes over texts of like length.

  Args:
    model: the model.
    texts: N texts.
    rows_a_text: S, rows of targets that each has.

  Yields:
    Indices of texts, the same filled up to a full batch (B,), and its tokens
    (B, L) and lengths (B,).
  """
  tokens, draws = _call_size(model, int(texts.lengths.max()))
  most = max(1, draws // rows_a_text)
  for size, rows, groups in buckets.batches(
    texts.lengths, tokens, sizes=texts.sizes
  ):
    rows = min(rows, buckets.power_of_two(most + 1) // 2)
    for group in groups:
      for start in range(0, len(group), rows):
        indices = group[start : start + rows]
        filled = np.resize(indices, rows)
        yield indices, filled, texts.rows(filled, size)


def _call_size(model: Model, longest: int) -> tuple[int, int]:
  """Text tokens and draws of one call, by the memory of the device."""
  memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  if memory is None or jax.default_backend() == "cpu":
    return _CALL_TOKENS, _CALL_DRAWS
  c, wide = model.config, model.compute.dtype == "float32"
  encoder = c.t5gemma or c
  item = 4 if wide else 2
  kept = 2 * c.decoder_layers * c.num_kv_heads * c.head_dim
  layer = 6 * encoder.d_model + 3 * encoder.d_ff
  layer += 4 * encoder.num_heads * encoder.head_dim
  # Without a kernel that keeps none, scores of a layer stand in memory twice;
  # those of T5Gemma's encoder always, in float32, of some queries at a time.
  scores = 2 * encoder.num_heads * longest if wide or c.t5gemma else 0
  cached = 4 * c.decoder_layers * c.num_kv_heads * c.head_dim
  row = item * cached * c.target_length + 8 * c.num_heads * longest
  free = _SHARE * memory / 2
  tokens = int(free / (item * (kept + layer + scores)))
  return max(tokens, _CALL_TOKENS), max(int(free / row), _CALL_DRAWS)


@functools.partial(jax.jit, static_argnames=("model",))
def score(
  model: Model,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  targets: jax.Array,
) -> jax.Array:
  """Log-probability of each objective given the text and those before it.

  Args:
    model: the model.
    params: of it.
    tokens: (B, L) int32.
    lengths: (B,) int32.
    targets: (B, S, T) int32.

  Returns:
    (B, S, O) float32; 0 where an objective is missing.
  """
  memory = regression_lm.encode(
    model.config, params, tokens, lengths, compute=model.compute
  )
  logprobs, _ = likelihood.token_logprobs(model, params, memory, targets)
  return likelihood.by_objective(model, logprobs)


@functools.partial(jax.jit, static_argnames=("model",))
def expectation(
  model: Model,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  grid: expected.Grid,
) -> jax.Array:
  """Expected scores (B, O) over a grid, by exact probabilities.

  Each objective is given the likeliest tokens of those before it.

  Args:
    model: the model.
    params: of it.
    tokens: (B, L) int32.
    lengths: (B,) int32.
    grid: of numbers and their scores.
  """
  targets = jnp.zeros((tokens.shape[0], model.codec.length), jnp.int32)
  if model.codec.num_objectives > 1:
    keys = jax.random.split(jax.random.key(0), tokens.shape[0])
    likeliest, _ = draw(
      model,
      params,
      tokens,
      lengths,
      keys,
      num_samples=1,
      sampling=Sampling(temperature=0.0),
    )
    targets = likeliest[:, 0]
  memory = regression_lm.encode(
    model.config, params, tokens, lengths, compute=model.compute
  )
  return expected.scores(model, params, memory, targets, grid)


def known_ids(model: Model, given: Sequence[Any], count: int) -> np.ndarray:
  """Ids (B, T) of targets whose last objectives are to be drawn, for `draw`.

  Args:
    model: the model.
    given: B targets; what is missing behind the last known one is drawn.
    count: B.

  Raises:
    InputError: a target does not do, or there are not B.
  """
  codec = model.codec
  if len(given) != count:
    raise InputError(f"{len(given)} known targets for {count} texts")
  known = codec.encode(given).reshape(count, codec.num_objectives, -1)
  there = known[:, :, 0] != MISSING
  later = np.cumsum(there[:, ::-1], axis=1)[:, ::-1]
  known = np.where((later > 0)[..., None], known, START)
  return known.reshape(count, codec.length).astype(np.int32)


def score_texts(
  model: Model, params: Params, texts: Texts, targets: np.ndarray
) -> np.ndarray:
  """`score` for any number of texts, (N, S, O) float64.

  The probability of zero is the sum over its spellings. What stands in front of
  an objective is as `targets` write it.

  Args:
    model: the model.
    params: of it.
    texts: N texts.
    targets: (N, S, T) int32.
  """
  codec = model.codec
  found = _scores(model, params, texts, targets)
  width = codec.format.length
  for place in range(codec.num_objectives):
    own = slice(place * width, (place + 1) * width)
    written = targets[..., None, own] == codec.zeros
    zero = written.all(axis=-1).any(axis=-1)
    for spelling in codec.zeros if zero.any() else ():
      other = targets.copy()
      other[zero, own] = spelling
      new = zero & (other[..., own] != targets[..., own]).any(axis=-1)
      if new.any():
        more = _scores(model, params, texts, other)[..., place]
        found[..., place] = np.where(
          new, np.logaddexp(found[..., place], more), found[..., place]
        )
  return found


def _scores(model, params, texts: Texts, targets: np.ndarray) -> np.ndarray:
  shape = (*targets.shape[:2], model.codec.num_objectives)
  found = np.empty(shape, np.float64)
  for indices, filled, batch in calls(model, texts, targets.shape[1]):
    scores = score(model, params, *batch, targets[filled])
    found[indices] = np.asarray(scores)[: len(indices)]
  return found


def expected_scores(
  model: Model, params: Params, texts: Texts, grid: expected.Grid
) -> np.ndarray:
  """`expectation` for any number of texts, (N, O) float64."""
  found = np.empty((len(texts.lengths), model.codec.num_objectives))
  for indices, _, batch in calls(model, texts, grid.ids.shape[1]):
    scores = expectation(model, params, *batch, grid)
    found[indices] = np.asarray(scores)[: len(indices)]
  return found
