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

from models import control_tokens, errors, language_model
from models.errors import InputError
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

  def __post_init__(self):
    """Checks the range; raises ValueError."""
    if not 0 <= self.scored < len(self.tokens):
      raise ValueError(f"{self.scored} of {len(self.tokens)} cannot be scored")


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
    max_length: most tokens that the model reads of a row, which may have one
      more: nothing is read behind the last one.
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
      max_length: of what the model reads; longer rows lose their beginning.
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

    As in lm-evaluation-harness the two are encoded as one text, white space at
    the end of the context counted to the continuation: what follows as many
    tokens as the context alone has is the continuation's. Where nothing
    follows, since it melted into the last token of its context, the two are
    encoded apart: the harness stops there. An empty context is replaced by a
    begin or end token.

    Raises:
      InputError: the continuation has no tokens, or more than `max_length`.
    """
    encode, stem = self.tokenizer.encode, context.rstrip()
    rest = context[len(stem) :] + continuation
    before, whole = encode(stem), encode(stem + rest)
    before, after = whole[: len(before)], whole[len(before) :]
    if rest and not len(after):
      before, after = encode(stem), encode(rest)
    if not len(after) and continuation.strip():
      raise InputError(
        f"the continuation {continuation[:40]!r} has no tokens: leave it out"
      )
    if len(after) > self.max_length:
      raise InputError(
        f"a continuation has {len(after)} tokens, and {self.max_length} are "
        "read at most: give a longer --max_length"
      )
    tokens = control_tokens.begun(
      self.tokenizer, np.concatenate([before, after])
    )
    if len(tokens) == len(after):
      start = control_tokens.prefix_id(self.tokenizer)
      if len(after) and after[0] == start:
        after = after[1:]
      else:
        tokens = np.concatenate([np.asarray([start], np.int32), after])
    return Row(tokens[-self.max_length - 1 :], len(after))

  def encode_whole(self, text: str) -> list[Row]:
    """Rows that score every token of `text` once; see `rolling`."""
    start = control_tokens.prefix_id(self.tokenizer)
    tokens = self.tokenizer.encode(text)
    return rolling(tokens, size=self.max_length, prefix=start)

  def score(
    self,
    rows: Sequence[Row],
    advance: Callable[[int], None] | None = None,
    *,
    most_sizes: int | None = None,
  ) -> list[Score]:
    """Scores rows in batches of like length.

    Rows that differ in their last token alone (answers A to D) are read once.

    Args:
      rows: of any lengths up to `max_length` + 1.
      advance: told how many more rows are done.
      most_sizes: lengths that rows are filled up to, each of which is compiled
        once; None for as many as there are.

    Returns:
      One score a row, in their order.

    Raises:
      InputError: the model's logits are not finite.
    """
    inputs: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
      inputs.setdefault(row.tokens[:-1].tobytes(), []).append(index)
    shared = list(inputs.values())
    lengths = [max(1, len(rows[same[0]].tokens) - 1) for same in shared]
    found: list[Score] = [Score(np.zeros(0), np.zeros(0, bool))] * len(rows)
    sizes = most_sizes and buckets.few_sizes(lengths, most_sizes)
    for size, count, batches in buckets.batches(
      lengths, self.batch_tokens, self.max_length, sizes
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
    if not np.isfinite(logprobs[:first]).all():
      raise errors.not_finite()
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


def rolling(tokens: np.ndarray, *, size: int, prefix: int) -> list[Row]:
  """Cuts a text into rows that score every token of it once.

  As `loglikelihood_rolling` of lm-evaluation-harness: the prefix stands before
  the text and nowhere else, every row scores `size` tokens given the one before
  them, and the last row, which has fewer, reads the same number.

  Args:
    tokens: (n,) int32.
    size: tokens that a row reads.
    prefix: what the first token is scored given.
  """
  stream = np.concatenate([np.asarray([prefix], np.int32), tokens])
  ends = [min(done + size, len(tokens)) for done in range(0, len(tokens), size)]
  return [
    Row(stream[max(0, end - size) : end + 1], end - done)
    for done, end in zip([0, *ends], ends)
  ]


def windows(
  tokens: np.ndarray, *, size: int, overlap: int, begin: int | None
) -> list[Row]:
  """Cuts a text into rows that score every token of it once.

  Unlike those of `rolling`, each may begin with the begin token. Every row has
  `size` tokens; the last one reaches further back for them.

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
