"""Tokens of examples, as batches.

Shapes by axis letter: N examples, B of a batch, L text tokens, T target tokens,
O objectives.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from models.errors import InputError
from models.numbers import MISSING, TargetCodec
from models.tokenizer import Tokenizer
from research.predictors.examples import Example, text_of
from research.text import buckets

# The largest float64.
_HUGE = np.finfo(np.float64).max
# Texts that are tokenized at a time.
_ENCODED = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
  """Tokens of N texts, one behind the other.

  Attributes:
    tokens: (all tokens,) int32.
    starts: (N + 1,) where each text begins.
    num_cut: texts that were too long and lost their end.
  """

  tokens: np.ndarray
  starts: np.ndarray
  num_cut: int

  @property
  def lengths(self) -> np.ndarray:
    """(N,) int32."""
    return np.diff(self.starts).astype(np.int32)

  @functools.cached_property
  def sizes(self) -> tuple[int, ...]:
    """The few lengths that batches are padded to, ascending."""
    return buckets.few_sizes(self.lengths)

  def rows(
    self, indices: np.ndarray, size: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, L) and lengths (B,) of some texts, int32.

    Args:
      indices: (B,) of the texts.
      size: L; None for the least of `sizes` that fits.
    """
    lengths = self.lengths[indices]
    size = size or buckets.fitting(int(lengths.max()), self.sizes)
    found = np.zeros((len(indices), size), np.int32)
    for row, index in enumerate(indices):
      begin, end = self.starts[index], self.starts[index + 1]
      found[row, : end - begin] = self.tokens[begin:end]
    return found, lengths


def read_texts(
  tokenizer: Tokenizer, texts: Iterable[str], max_length: int
) -> Texts:
  """Tokenizes texts, behind a begin token where the tokenizer has one.

  Those of more than `max_length` tokens lose their end; one warning says how
  many.

  Raises:
    InputError: there is no text, or one is empty or no text (names it), or the
      tokenizer cannot read one.
  """
  texts = list(texts)
  if not texts:
    raise InputError("there is no text: give at least one")
  for row, text in enumerate(texts):
    if not isinstance(text, str):
      raise InputError(
        f"text {row} is a {type(text).__name__}: give a str (for bytes, decode)"
      )
    if not text:
      raise InputError(f"text {row} is empty: a number needs a text")
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  rows: list[np.ndarray] = []
  num_cut = 0
  # Few texts are tokenized at a time, because an encoding takes a hundred times
  # the memory of its ids.
  for start in range(0, len(texts), _ENCODED):
    part = texts[start : start + _ENCODED]
    for row, found in enumerate(tokenizer.encode_all(part), start):
      if not found:
        raise InputError(
          f"text {row} has no token of this tokenizer: leave it out"
        )
      ids = [*begin, *found]
      num_cut += len(ids) > max_length
      rows.append(np.array(ids[:max_length], np.int32))
  if num_cut:
    warnings.warn(
      f"{num_cut} of {len(rows)} texts have more than {max_length} tokens and "
      "lose their end: give a larger max_length to keep it",
      stacklevel=2,
    )
  starts = np.cumsum([0, *map(len, rows)])
  tokens = np.concatenate([np.zeros(0, np.int32), *rows])
  return Texts(tokens, starts, num_cut)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Tokenized examples; batches are a pure function of step and seed.

  Attributes:
    texts: of N examples.
    targets: (N, T) int32.
    scores: (N, O) float32 for losses over a grid, or None.
  """

  texts: Texts
  targets: np.ndarray
  scores: np.ndarray | None = None

  def __len__(self) -> int:
    """N."""
    return len(self.targets)

  @property
  def is_ragged(self) -> bool:
    """Whether padding to the longest text would waste more than a quarter."""
    lengths = self.texts.lengths
    return bool(lengths.mean() < 0.75 * lengths.max())

  def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of some examples, as `learn.loss_sums` takes it."""
    tokens, lengths = self.texts.rows(indices)
    batch = {
      "tokens": tokens,
      "lengths": lengths,
      "targets": self.targets[indices],
    }
    if self.scores is not None:
      batch["scores"] = self.scores[indices]
    return batch

  def batch_at(self, step: int, rows: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of a step.

    Examples come in random order, every one once an epoch; a batch may span
    two epochs. Texts of like length stand together in a batch where that saves
    padding.
    """
    return self.rows(self.indices_at(step, rows, seed))

  def indices_at(self, step: int, rows: int, seed: int) -> np.ndarray:
    """The examples (B,) of `batch_at`."""
    if not self.is_ragged:
      return _stream(len(self), seed, step * rows, rows)
    # Pools of so many batches are sorted by length.
    pool = min(32, max(1, len(self) // rows))
    number, place = divmod(step, pool)
    indices = _stream(len(self), seed, number * pool * rows, pool * rows)
    order = np.argsort(self.texts.lengths[indices], kind="stable")
    shuffled = np.random.default_rng((seed, 1, number)).permutation(pool)
    return indices[order].reshape(pool, rows)[shuffled[place]]

  def whole(self, rows: int) -> list[dict[str, np.ndarray]]:
    """All examples once, in batches of `rows`, the last filled with none.

    What fills it has no objectives, so that it counts for nothing.
    """
    order = np.argsort(self.texts.lengths, kind="stable")
    batches = []
    for start in range(0, len(self), rows):
      indices = order[start : start + rows]
      filled = np.resize(indices, rows)
      batch = self.rows(filled)
      batch["targets"] = batch["targets"].copy()
      batch["targets"][len(indices) :] = MISSING
      if self.scores is not None:
        batch["scores"] = batch["scores"].copy()
        batch["scores"][len(indices) :] = np.nan
      batches.append(batch)
    return batches


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, 0, epoch)).permutation(count)


def _stream(count: int, seed: int, start: int, size: int) -> np.ndarray:
  """Part of the endless row of shuffled epochs."""
  places = np.arange(start, start + size)
  epochs = places // count
  found = np.empty(size, np.int64)
  for epoch in np.unique(epochs):
    at = epochs == epoch
    found[at] = _permutation(count, seed, int(epoch))[places[at] % count]
  return found


def _warn_of_range(examples, targets, codec: TargetCodec) -> None:
  """Warns of targets that the number format can only clip."""
  written = codec.values(targets)
  given = np.full(written.shape, np.nan)
  for row, example in enumerate(examples):
    for place, value in enumerate(codec.objectives(example.y)):
      # What cannot be a float64 lies beyond the largest of a format anyhow.
      if np.isfinite(written[row, place]):
        given[row, place] = min(max(value, -_HUGE), _HUGE)
  large, small = (int(lost.sum()) for lost in codec.format.lost(given))
  if large or small:
    warnings.warn(
      f"of {len(examples)} examples {large} targets are too large for the "
      f"format of numbers and {small} become 0: give one with more digits of "
      "the exponent, such as numbers=Ieee(exponent_digits=2)",
      stacklevel=3,
    )


def build(
  examples: Sequence[Example],
  tokenizer: Tokenizer,
  codec: TargetCodec,
  max_length: int,
) -> Dataset:
  """Tokenizes examples.

  Raises:
    InputError: there is none, or a text or a target does not do.
  """
  if not len(examples):
    raise InputError("there are no examples: give at least one")
  for row, example in enumerate(examples):
    if not hasattr(example, "x") or not hasattr(example, "y"):
      raise InputError(
        f"example {row} is a {type(example).__name__}: give Example(x=text, "
        "y=number)"
      )
  targets = codec.encode([example.y for example in examples])
  if (targets == MISSING).all():
    raise InputError("no example has a target: give numbers as y")
  _warn_of_range(examples, targets, codec)
  texts = read_texts(tokenizer, (text_of(e) for e in examples), max_length)
  return Dataset(texts, targets)
