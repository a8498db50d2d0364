"""Texts of symbols that ask for what stood in them before.

Two tasks where a compressed past shows what it forgot. `pairs`: keys and values
stand in front, and each key comes again somewhere behind, where its value is
the next token (multi-query associative recall, Zoology,
https://arxiv.org/abs/2312.04927). `needle`: facts are strewn over the text, a
mark, a key and two values each, and its end asks for some of them.

Tokens are 0 for "asked", 1 for "fact", and then as many keys as values and
fillers. Texts are a pure function of a seed. Shapes by axis letter: N texts, L
tokens that are read, C pairs.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from models.errors import InputError
from research.core.options import option

TASKS = ("pairs", "needle")
ASKED, FACT, _FIRST = 0, 1, 2
# Texts begin up to so many tokens late, so that no chunk lies alike in all.
_SHIFTS = 8
# Facts of which the end of a text asks, at most.
_QUESTIONS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What is asked; every attribute is described by its metadata."""

  task: str = option("pairs", "pairs, or needle", choices=TASKS)
  pairs: int = option(16, "pairs of a training text at most", lower=1)
  symbols: int | None = option(
    None, "keys, and as many values and fillers; all of --vocab_size", lower=2
  )
  test_texts: int = option(512, "of each length and number of pairs", lower=8)

  def check(self, length: int, pairs: int, vocab_size: int) -> None:
    """Raises InputError where texts of these sizes cannot be."""
    if (room := self.most_pairs(length)) < pairs:
      raise InputError(
        f"{pairs} pairs of --task={self.task} do not fit into {length} tokens, "
        f"but {max(room, 0)} do: take fewer, or longer texts"
      )
    most = (vocab_size - _FIRST) // 3
    if (keys := self.keys(vocab_size)) > most:
      raise InputError(
        f"--symbols={keys}: --vocab_size={vocab_size} has {most}: take fewer"
      )
    if keys < pairs:
      raise InputError(
        f"{pairs} pairs want as many keys, but there are {keys}: take more "
        "--symbols, or a larger --vocab_size"
      )

  def tests(
    self, lengths: Sequence[int], pairs: Sequence[int], vocab_size: int
  ) -> list[tuple[int, int]]:
    """(length, pairs) of the tests: those of all for which texts have room.

    Raises:
      InputError: there are none, or too few keys for one.
    """
    found = [
      (length, count)
      for length in lengths
      for count in pairs
      if count <= self.most_pairs(length)
    ]
    if not found:
      raise InputError(
        f"--test_pairs={list(pairs)} fit into none of "
        f"--test_lengths={list(lengths)}: take fewer or longer ones"
      )
    for length, count in found:
      self.check(length, count, vocab_size)
    return found

  def keys(self, vocab_size: int) -> int:
    """Keys there are, and as many values and fillers."""
    return self.symbols or (vocab_size - _FIRST) // 3

  def most_pairs(self, length: int) -> int:
    """Pairs for which a text of `length` tokens that are read has room."""
    room = length + 1 - _SHIFTS
    if self.task == "pairs":
      return room // 4
    # Of few facts all are asked.
    few = room // 8
    return few if few < _QUESTIONS else room // 4 - _QUESTIONS


def texts(
  task: Task,
  key: tuple[int, ...],
  count: int,
  length: int,
  pairs: int,
  vocab_size: int,
  *,
  vary: bool,
) -> dict[str, np.ndarray]:
  """Draws texts.

  Args:
    task: what is asked.
    key: of the random numbers.
    count: N.
    length: L.
    pairs: C.
    vocab_size: tokens there are.
    vary: a text has 1 to C pairs, else C.

  Returns:
    As `research.language_model.learn.token_sums` takes it: "tokens" (N, L + 1)
    int32, and "segment_ids" (N, L) int32, 0 where the next token is asked for
    and -1 elsewhere.

  Raises:
    InputError: the sizes cannot be.
  """
  task.check(length, pairs, vocab_size)
  rng = np.random.default_rng(key)
  size = task.keys(vocab_size)
  keys, values, filler = (_FIRST + i * size + np.arange(size) for i in range(3))
  tokens = rng.choice(filler, (count, length + 1)).astype(np.int32)
  counts = np.full(count, pairs)
  if vary:
    counts = rng.integers(1, pairs + 1, count)
  there = np.arange(pairs)[None] < counts[:, None]
  own = _distinct(rng, count, size, pairs)
  facts = {"key": keys[own], "value": rng.choice(values, (2, count, pairs))}
  shift = rng.integers(0, _SHIFTS, count)
  draw = _pairs if task.task == "pairs" else _needle
  asked = draw(rng, tokens, counts, there, facts, shift)
  return {"tokens": tokens, "segment_ids": np.where(asked, 0, -1)[:, :-1]}


def _distinct(rng, count, most, picks):
  """`picks` different numbers below `most` in each of `count` rows."""
  return np.argsort(rng.random((count, most)), axis=1)[:, :picks]


def _write(tokens, places, there, *parts):
  """Writes parts one after the other at places (N, C), where they are there."""
  rows = np.broadcast_to(np.arange(len(tokens))[:, None], places.shape)
  for offset, part in enumerate(parts):
    part = np.broadcast_to(part, places.shape)
    tokens[rows[there], places[there] + offset] = part[there]


def _pairs(rng, tokens, counts, there, facts, shift):
  """Pairs in front, then each key once more; slots have two tokens."""
  count, pairs = there.shape
  slots = (tokens.shape[1] - _SHIFTS) // 2
  key, value = facts["key"], facts["value"][0]
  order = rng.random((count, slots))
  order[np.arange(slots)[None] < counts[:, None]] = 2
  asked_at = np.argsort(order, axis=1)[:, :pairs]
  asked = np.zeros(tokens.shape, bool)
  for slot in (np.arange(pairs)[None], asked_at):
    places = shift[:, None] + 2 * np.broadcast_to(slot, there.shape)
    _write(tokens, places, there, key, value)
  _write(asked, places, there, True)
  return asked


def _needle(rng, tokens, counts, there, facts, shift):
  """Facts in slots of four tokens, questions at the end."""
  count, pairs = there.shape
  questions = min(pairs, _QUESTIONS)
  end = tokens.shape[1] - 4 * questions
  slots = (end - _SHIFTS) // 4
  key, (first, second) = facts["key"], facts["value"]
  places = shift[:, None] + 4 * _distinct(rng, count, slots, pairs)
  _write(tokens, places, there, FACT, key, first, second)
  # Facts lie at random, so that the first ones are any; of a text with fewer
  # some are asked again.
  which = np.arange(questions)[None] % counts[:, None]
  of = lambda x: np.take_along_axis(x, which, axis=1)
  places = np.broadcast_to(end + 4 * np.arange(questions)[None], which.shape)
  every = np.ones(which.shape, bool)
  _write(tokens, places, every, ASKED, of(key), of(first), of(second))
  asked = np.zeros(tokens.shape, bool)
  for offset in (1, 2):
    _write(asked, places + offset, every, True)
  return asked


def answers(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Places of what is asked for, and the answers, both (N, A).

  Args:
    batch: of `texts`, with A questions in every text.
  """
  asked = batch["segment_ids"] >= 0
  places = np.nonzero(asked)[1].reshape(len(asked), -1)
  right = np.take_along_axis(batch["tokens"], places + 1, axis=1)
  return places.astype(np.int32), right
