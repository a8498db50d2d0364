"""Log-likelihoods of texts under a language model, in few compiled shapes.

Shapes by axis letter: B rows of a batch, T tokens, N scored tokens of a batch,
D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import control_tokens, language_model
from models.tokenizer import Tokenizer
from research.text import buckets

# Logits are made for so many tokens at a time.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Row:
  """Tokens, of which the last `scored` are scored given those before them.

  Attributes:
    tokens: (T,) int32.
    scored: 0 to T - 1.
  """

  tokens: np.ndarray
  scored: int


@dataclasses.dataclass(frozen=True)
class Score:
  """What the model says of a row's scored tokens.

  Attributes:
    logprobs: (scored,) float32 natural log-probabilities.
    greedy: (scored,) bool, whether the token is the likeliest one.
  """

  logprobs: np.ndarray
  greedy: np.ndarray

  @property
  def total(self) -> float:
    """Log-likelihood of all scored tokens."""
    return float(np.sum(self.logprobs, dtype=np.float64))


class Scorer:
  """A model and its tokenizer, ready to score texts.

  Attributes:
    tokenizer: of the model.
    max_length: tokens of the longest row.
    batch_tokens: that one call reads at most, or one row.
  """

  def __init__(
    self,
    config: language_model.Config,
    params: language_model.Params,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    batch_tokens: int,
  ):
    """Keeps a reference to `params`.

    Args:
      config: of the model.
      params: of the model.
      tokenizer: of the model.
      max_length: longer rows lose their beginning.
      batch_tokens: padding included, one call reads at most so many tokens,
        or one row.
    """
    self.tokenizer = tokenizer
    self.max_length = max_length
    self._config = config
    self._params = params
    self.batch_tokens = batch_tokens

  def encode_pair(self, context: str, continuation: str) -> Row:
    """A row that scores `continuation` given `context`.

    The two are encoded as one text, white space at the end of the context
    counted to the continuation, as lm-evaluation-harness does: what follows as
    many tokens as the context alone has is the continuation's. An empty
    context is replaced by a begin or end token.
    """
    stem = context.rstrip()
    whole = self.tokenizer.encode(context + continuation)
    count = len(self.tokenizer.encode(stem)) if stem else 0
    start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
    if not start and not count:
      start = [control_tokens.start_id(self.tokenizer)]
    tokens = np.concatenate([np.asarray(start, np.int32), whole])
    tokens = tokens[-self.max_length :]
    return Row(tokens, min(len(whole) - count, len(tokens) - 1))

  def encode_whole(self, text: str) -> list[Row]:
    """Rows that score every token of `text` once; see `windows`."""
    tokens = self.tokenizer.encode(text)
    if self.tokenizer.bos_id is None:
      start = control_tokens.start_id(self.tokenizer)
      tokens = np.concatenate([np.asarray([start], np.int32), tokens])
    return windows(
      tokens, size=self.max_length, overlap=0, begin=self.tokenizer.bos_id
    )

  def score(
    self, rows: Sequence[Row], advance: Callable[[int], None] | None = None
  ) -> list[Score]:
    """Scores rows in batches of like length.

    Rows that differ in their last token alone (answers A to D) are read once.

    Args:
      rows: of any lengths up to `max_length`.
      advance: told how many more rows are done.

    Returns:
      One score a row, in their order.
    """
    inputs: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
      inputs.setdefault(row.tokens[:-1].tobytes(), []).append(index)
    shared = list(inputs.values())
    lengths = [max(1, len(rows[same[0]].tokens) - 1) for same in shared]
    found: list[Score] = [Score(np.zeros(0), np.zeros(0, bool))] * len(rows)
    for size, count, batches in buckets.batches(
      lengths, self.batch_tokens, self.max_length
    ):
      batches = [[shared[i] for i in batch] for batch in batches]
      queries = max(_num_scored(rows, batch) for batch in batches)
      queries = max(32, buckets.power_of_two(queries))
      for batch in batches:
        self._score_batch(rows, batch, (count, size), queries, found)
        if advance is not None:
          advance(sum(map(len, batch)))
    return found

  def _score_batch(
    self,
    rows: Sequence[Row],
    batch: list[list[int]],
    shape: tuple[int, int],
    num_queries: int,
    found: list[Score],
  ) -> None:
    """Scores one batch; `batch` lists for each line the rows it serves."""
    tokens = np.zeros(shape, np.int32)
    # Line, position and target of every scored token.
    queries = np.zeros((3, num_queries), np.int32)
    first = 0
    for line, same in enumerate(batch):
      inputs = rows[same[0]].tokens[:-1]
      tokens[line, : len(inputs)] = inputs
      for row in (rows[index] for index in same):
        part = slice(first, first + row.scored)
        queries[0, part] = line
        queries[1, part] = len(inputs) - row.scored + np.arange(row.scored)
        queries[2, part] = row.tokens[len(row.tokens) - row.scored :]
        first += row.scored
    logprobs, greedy = jax.device_get(
      _score(self._config, self._params, tokens, *queries)
    )
    first = 0
    for index in (index for same in batch for index in same):
      part = slice(first, first + rows[index].scored)
      found[index] = Score(logprobs[part], greedy[part])
      first += rows[index].scored


def _num_scored(rows: Sequence[Row], batch: list[list[int]]) -> int:
  return sum(rows[index].scored for same in batch for index in same)


@functools.partial(jax.jit, static_argnums=0)
def _score(
  config: language_model.Config,
  params: language_model.Params,
  tokens: jax.Array,
  lines: jax.Array,
  positions: jax.Array,
  targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Log p(target | tokens[line, :position + 1]) and whether it is the best.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32, padded on the right.
    lines: (N,) int32.
    positions: (N,) int32.
    targets: (N,) int32.

  Returns:
    (N,) float32 and (N,) bool. Logits are made for 256 tokens at a time.
  """
  hidden = language_model.hidden_states(config, params, tokens)
  hidden = hidden[lines, positions]
  chunk = min(_CHUNK, len(targets))

  def some(hidden_and_targets):
    hidden, targets = hidden_and_targets
    logits = language_model.logits(config, params, hidden)
    taken = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    logprobs = taken - jax.nn.logsumexp(logits, axis=-1)
    return logprobs, jnp.argmax(logits, axis=-1) == targets

  split = lambda x: x.reshape(-1, chunk, *x.shape[1:])
  logprobs, greedy = jax.lax.map(some, (split(hidden), split(targets)))
  return logprobs.reshape(-1), greedy.reshape(-1)


def windows(
  tokens: np.ndarray, *, size: int, overlap: int, begin: int | None
) -> list[Row]:
  """Cuts a text into rows that score every token of it once.

  Every row has `size` tokens; the last one reaches further back for them,
  so that it too is full, as in lm-evaluation-harness.

  Args:
    tokens: (n,) int32.
    size: tokens of a row, those that are context alone included.
    overlap: tokens that a row repeats from the one before as context; without
      `begin` at least 1, and then the first token of the text is not scored.
    begin: stands before every row, or None.

  Raises:
    ValueError: `size` leaves no token to score.
  """
  head = np.asarray([] if begin is None else [begin], np.int32)
  overlap = max(overlap, 1) if begin is None else overlap
  body = size - len(head)
  if body <= overlap:
    raise ValueError(f"rows of {size} tokens with {overlap} repeated are full")
  rows, done = [], 0 if begin is not None else 1
  while done < len(tokens):
    end = min(max(0, done - overlap) + body, len(tokens))
    part = tokens[max(0, end - body) : end].astype(np.int32)
    rows.append(Row(np.concatenate([head, part]), end - done))
    done = end
  return rows
