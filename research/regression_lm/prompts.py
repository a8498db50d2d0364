"""Examples in front of a text: adaptation to a task without new weights.

A prompt is a line "text => number" for each example, and the text that is asked
for behind them. It is of use to models that were trained with prompts
(`prompt_shots` of `FineTuneOptions` and `DataOptions`), and to no others: to
those, what stands in front is a longer text of a kind that they never saw.
"""

import dataclasses
import math
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse

from models.errors import InputError
from models.tokenizer import Tokenizer
from research.predictors.examples import Example, text_of
from research.regression_lm import arguments, token_batches
from research.regression_lm.token_batches import Dataset

CHOICES = ("nearest", "random")
# Texts are compared by the runs of so many characters that they share.
_GRAM, _BUCKETS = 3, 1 << 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """Which examples stand in front of a text.

  Attributes:
    examples: known ones, of the task that the texts are of.
    shots: so many at most; those that do not fit into the model's `max_length`
      are left out, the least near first.
    choose: "nearest" by shared runs of three characters, the nearest last, or
      "random", other ones for every text.
    seed: of "random".
  """

  examples: Sequence[Example]
  shots: int = 8
  choose: str = "nearest"
  seed: int = 0

  def __post_init__(self):
    """Checks the options; raises InputError."""
    if self.choose not in CHOICES:
      raise InputError(f"choose={self.choose!r}: take one of {CHOICES}")
    arguments.integer("shots", self.shots, 1)
    if not len(self.examples):
      raise InputError("a prompt has no example: give at least one")


def line(example: Example) -> str:
  """How an example is written in a prompt."""
  values = example.y if np.ndim(example.y) else [example.y]
  return f"{example.x} => {', '.join(map(_number, values))}\n"


def _number(value: Any) -> str:
  if value is None or isinstance(value, str):
    return value or "?"
  try:
    return format(float(value), ".6g")
  except (TypeError, ValueError) as error:
    raise InputError(f"an example has y={value!r}: give a number") from error


def texts(
  prompt: Prompt | Sequence[Example],
  xs: Sequence[Any],
  tokenizer: Tokenizer,
  max_length: int,
) -> list[str]:
  """Texts behind their examples.

  One warning says how many have fewer examples than asked for, since they
  would be too long.

  Args:
    prompt: the examples, and how they are chosen.
    xs: texts, or examples whose texts are asked for.
    tokenizer: of the model.
    max_length: its tokens of a text.

  Raises:
    InputError: a text or an example does not do.
  """
  if not isinstance(prompt, Prompt):
    prompt = Prompt(examples=prompt)
  asked = [text_of(x) for x in xs]
  for number, text in enumerate([*asked, *(e.x for e in prompt.examples)]):
    if not isinstance(text, str):
      raise InputError(f"text {number} is a {type(text).__name__}: give a str")
  lines = [line(example) for example in prompt.examples]
  order = _order(prompt, asked)
  room = max_length - _counts(tokenizer, asked)
  sizes = _counts(tokenizer, lines, begin=False)
  kept = [
    chosen[_left_out(sizes[chosen], left) :]
    for chosen, left in zip(order, room)
  ]
  short = sum(len(k) < len(chosen) for k, chosen in zip(kept, order))
  if short:
    warnings.warn(
      f"{short} of {len(asked)} prompts lose examples, since the model takes "
      f"{max_length} tokens: give fewer shots, or a larger max_length",
      stacklevel=2,
    )
  return [
    "".join([*(lines[i] for i in chosen), text])
    for chosen, text in zip(kept, asked)
  ]


def _order(prompt: Prompt, asked: Sequence[str]) -> list[np.ndarray]:
  """The examples of each text, the last nearest to it."""
  count = len(prompt.examples)
  shots = min(prompt.shots, count)
  if prompt.choose == "random":
    return [
      np.random.default_rng((prompt.seed, 21, i)).permutation(count)[:shots]
      for i in range(len(asked))
    ]
  known = _grams([example.x for example in prompt.examples])
  near = (_grams(asked) @ known.T).toarray()
  return list(np.argsort(near, axis=1, kind="stable")[:, count - shots :])


def _grams(texts: Sequence[str]) -> scipy.sparse.csr_array:
  """Which runs of characters the texts have: rows of length one."""
  columns = [
    np.array(
      sorted(
        {
          zlib.crc32(text[i : i + _GRAM].encode(errors="replace")) % _BUCKETS
          for i in range(max(1, len(text) - _GRAM + 1))
        }
      )
    )
    for text in texts
  ]
  counts = [len(row) for row in columns]
  values = np.repeat([1 / math.sqrt(n) for n in counts], counts)
  starts = np.cumsum([0, *counts])
  return scipy.sparse.csr_array(
    (values, np.concatenate(columns), starts), shape=(len(texts), _BUCKETS)
  )


def _counts(
  tokenizer: Tokenizer, texts: Sequence[str], begin: bool = True
) -> np.ndarray:
  """Tokens of each text, a begin token included."""
  more = begin and tokenizer.bos_id is not None
  return np.array([len(ids) + more for ids in tokenizer.encode_all(texts)])


def _left_out(sizes: np.ndarray, room: int) -> int:
  """How many of the first must go, so that the rest fits."""
  return len(sizes) - int((np.cumsum(sizes[::-1]) <= room).sum())


class Others:
  """Examples, in front of each of which others of its task may stand."""

  def __init__(
    self, given: Sequence[Example], tokenizer: Tokenizer, max_length: int
  ):
    """Tokenizes each once, to know what fits."""
    self._texts = [example.x for example in given]
    self._lines = [line(example) for example in given]
    self._room = max_length - _counts(tokenizer, self._texts)
    self._sizes = _counts(tokenizer, self._lines, begin=False)
    self._tasks = [getattr(example, "task", "") for example in given]
    members: dict[str, list[int]] = {}
    self._place = []
    for number in range(len(given)):
      of_task = members.setdefault(self._tasks[number], [])
      self._place.append(len(of_task))
      of_task.append(number)
    self._members = {task: np.array(rows) for task, rows in members.items()}

  def prompted(self, index: int, shots: int, rng: np.random.Generator) -> str:
    """The text of an example behind `shots` random others, or fewer."""
    members, place = self._members[self._tasks[index]], self._place[index]
    count = min(shots, len(members) - 1)
    chosen = rng.choice(len(members) - 1, count, replace=False)
    # The example itself is left out of its prompt, because it would give its
    # number away.
    chosen = members[chosen + (chosen >= place)]
    kept = chosen[_left_out(self._sizes[chosen], self._room[index]) :]
    return "".join([*(self._lines[i] for i in kept), self._texts[index]])


@dataclasses.dataclass(frozen=True, eq=False)
class Prompted(Dataset):
  """Examples that have others in front, new ones at every step.

  Attributes:
    others: the same examples, to choose from.
    tokenizer: of the model.
    max_length: its tokens of a text.
    shots: at most; their number is even over 0, ..., `shots`, so that the model
      learns to do with few, and with none.
  """

  others: Others | None = None
  tokenizer: Tokenizer | None = None
  max_length: int = 0
  shots: int = 0

  def batch_at(self, step: int, rows: int, seed: int) -> dict[str, np.ndarray]:
    """The batch of a step, a function of step and seed."""
    indices = self.indices_at(step, rows, seed)
    rng = np.random.default_rng((seed, 22, step))
    texts = [
      self.others.prompted(i, int(rng.integers(self.shots + 1)), rng)
      for i in indices
    ]
    found = token_batches.read_texts(self.tokenizer, texts, self.max_length)
    batch = self.rows(indices)
    tokens, lengths = found.rows(np.arange(rows))
    return batch | {"tokens": tokens, "lengths": lengths}


def of_training(
  data: Dataset,
  given: Sequence[Example],
  tokenizer: Tokenizer,
  max_length: int,
  shots: int,
) -> Prompted:
  """`data`, which is of the examples `given`, with prompts."""
  return Prompted(
    data.texts,
    data.targets,
    data.scores,
    others=Others(given, tokenizer, max_length),
    tokenizer=tokenizer,
    max_length=max_length,
    shots=shots,
  )


def of_validation(
  valid: Sequence[Example],
  train: Sequence[Example],
  tokenizer: Tokenizer,
  max_length: int,
  shots: int,
) -> list[Example]:
  """Examples behind `shots` others of their task, of both parts."""
  both = Others([*valid, *train], tokenizer, max_length)
  return [
    Example(both.prompted(i, shots, np.random.default_rng((23, i))), example.y)
    for i, example in enumerate(valid)
  ]
