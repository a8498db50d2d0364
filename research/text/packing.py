"""Text as packed windows of tokens: a function of the step and the seed.

Documents lie one behind the other, each with the tokenizer's boundary token in
front: it is the first input of its own document and the last target of the one
before. Windows cut this stream without regard to documents, and segment ids
tell them apart inside of a window. So every token is a target once an epoch.

Axis letters: B windows of a batch, L tokens of a window.
"""

import dataclasses
import functools
import math

import numpy as np

from models.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A stream of tokens.

  Attributes:
    tokens: (n,) integers, often a memory map.
    starts: (d,) int64, ascending: where documents begin.
    digest: of what the stream was made from.
  """

  tokens: np.ndarray
  starts: np.ndarray
  digest: str

  def split(self, share: float) -> tuple["Corpus", "Corpus"]:
    """The stream without its last `share`, and that part."""
    at = int(len(self.tokens) * (1 - share))
    head, tail = self.starts[self.starts < at], self.starts[self.starts >= at]
    return (
      dataclasses.replace(self, tokens=self.tokens[:at], starts=head),
      dataclasses.replace(self, tokens=self.tokens[at:], starts=tail - at),
    )

  def counts(self, vocab_size: int) -> np.ndarray:
    """How often each token is in the stream, (V,) int64."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(self.tokens), 1 << 24):
      part = self.tokens[start : start + (1 << 24)]
      counts += np.bincount(part, minlength=vocab_size)
    return counts

  def unigram_entropy(self, vocab_size: int) -> float:
    """Entropy in nats of the frequencies of the stream's tokens."""
    counts = self.counts(vocab_size)
    share = counts[counts > 0] / len(self.tokens)
    return float(-np.sum(share * np.log(share)))

  def windows(self, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Windows that begin at `starts` (B,).

    Returns:
      tokens: (B, L + 1) int32, inputs and, one later, their targets.
      segment_ids: (B, L) int32 of the inputs, from 0 in every row.
    """
    places = np.asarray(starts)[:, None] + np.arange(length + 1)
    documents = np.searchsorted(self.starts, places[:, :-1], side="right")
    return {
      "tokens": np.asarray(self.tokens[places], np.int32),
      "segment_ids": (documents - documents[:, :1]).astype(np.int32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
  """Training batches.

  Attributes:
    corpus: to draw from.
    rows: B.
    length: L.
  """

  corpus: Corpus
  rows: int
  length: int

  def __post_init__(self):
    """Checks that there is a window.

    Raises:
      InputError: there is none.
    """
    if self.per_epoch < 1:
      raise InputError(
        f"the training text has only {len(self.corpus.tokens)} tokens, and "
        f"--length={self.length} needs {2 * self.length}: give a longer --text "
        "or a smaller --length"
      )

  @property
  def per_epoch(self) -> int:
    """Windows of an epoch."""
    return len(self.corpus.tokens) // self.length - 1

  def batch_at(self, step: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of a step: a pure function, so that resume is exact.

    Every window comes once an epoch, in an order and cut at an offset that the
    seed and the epoch decide.
    """
    epochs, places = np.divmod(
      np.arange(step * self.rows, (step + 1) * self.rows), self.per_epoch
    )
    starts = np.empty(self.rows, np.int64)
    for epoch in np.unique(epochs):
      order, offset = _epoch(seed, int(epoch), self.per_epoch, self.length)
      here = epochs == epoch
      starts[here] = order[places[here]] * self.length + offset
    return self.corpus.windows(starts, self.length)


@functools.lru_cache(maxsize=2)
def _epoch(
  seed: int, epoch: int, windows: int, length: int
) -> tuple[np.ndarray, int]:
  """Order of the windows, and where the first one begins."""
  generator = np.random.default_rng((seed, epoch))
  return generator.permutation(windows), int(generator.integers(length))


def held_out(
  corpus: Corpus, *, rows: int, length: int, most: int | None = None
) -> list[dict[str, np.ndarray]]:
  """Batches of held-out windows, which share no target.

  Args:
    corpus: held-out text.
    rows: B; the last batch is filled up with padding, segment id -1.
    length: L.
    most: windows at most, spread evenly over the text; None takes all.

  Raises:
    InputError: the text has no window.
  """
  count = (len(corpus.tokens) - 1) // length
  if count < 1:
    raise InputError(
      f"the held-out text has only {len(corpus.tokens)} tokens, and "
      f"--length={length} needs {length + 1}: give a longer --eval_text or a "
      "larger --held_out"
    )
  wanted = min(count, most or count)
  chosen = np.arange(wanted) * count // wanted
  padded = np.resize(chosen, rows * math.ceil(wanted / rows))
  batches = []
  for first in range(0, len(padded), rows):
    batch = corpus.windows(padded[first : first + rows] * length, length)
    batch["segment_ids"][max(wanted - first, 0) :] = -1
    batches.append(batch)
  return batches
