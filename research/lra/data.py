"""Data of the tasks: generated, or read from files of users.

Shapes by axis letter: N sequences, L tokens.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Self

import numpy as np

from models.errors import InputError
from research.core import files
from research.lra import listops, pathfinder, reading
from research.lra.options import Options as RunOptions
from research.lra.reading import Split
from research.lra.tasks import Task

_SPLITS = ("train", "valid", "test")
# Sequences of the benchmark's generated tasks.
_LISTOPS = {"train": 96_000, "valid": 2_000, "test": 2_000}
_PATHFINDER = {"train": 160_000, "valid": 20_000, "test": 20_000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What data.

  Attributes:
    path: folder of files, or None to generate.
    length: tokens of a sequence at most; what is behind is cut off.
    level: of generated Pathfinder, a key of `pathfinder.LEVELS`.
    examples: training sequences that are used; None for all. Of generated
      tasks so many are generated, and a sixteenth, at least 512, to validate
      and to test.
    seed: of generated data.
    cache: folder that generated data is kept in.
  """

  path: str | None = None
  length: int
  level: str = "hard"
  examples: int | None = None
  seed: int = 0
  cache: str = "runs/lra_data"

  @classmethod
  def of(cls, options: RunOptions, path: str | None, cache: str) -> Self:
    """What a run asks for."""
    return cls(
      path=path,
      length=options.sequence_length,
      level=options.level,
      examples=options.examples,
      seed=options.data_seed,
      cache=cache,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """The three parts of a task's data.

  Attributes:
    train: what models learn from.
    valid: what settings and updates are chosen by.
    test: what is looked at once.
  """

  train: Split
  valid: Split
  test: Split


def load(
  task: Task, options: Options, say: Callable[[str], None] = print
) -> Data:
  """The data of a task.

  Args:
    task: one of `tasks.TASKS`.
    options: what data.
    say: told what takes a while.

  Raises:
    InputError: it is not there, damaged, or of another task.
  """
  task.check(options.path)
  task.check_length(options.length)
  if options.path is None:
    parts = _generated(task, options, say)
  else:
    path = pathlib.Path(options.path).expanduser()
    parts = reading.read(path, task, options.length)
  if options.examples is not None:
    parts["train"] = parts["train"].first(options.examples)
  for name, part in parts.items():
    if not len(part.labels):
      raise InputError(f"--data={options.path}: its {name} part is empty")
    if part.labels.min() < 0 or part.labels.max() >= task.classes:
      raise InputError(
        f"--data={options.path}: labels of its {name} part are up to "
        f"{part.labels.max()}, but --task={task.name} has {task.classes} "
        "classes: give the data of this task"
      )
  return Data(**parts)


def _generated(task, options, say) -> dict[str, Split]:
  sizes = dict(_LISTOPS if task.name == "listops" else _PATHFINDER)
  if options.examples is not None:
    few = max(options.examples // 16, 512)
    sizes = {"train": options.examples, "valid": few, "test": few}
  make = _listops if task.name == "listops" else _pathfinder
  described = {
    "task": task.name,
    "sizes": sizes,
    "length": options.length,
    "level": options.level,
    "seed": options.seed,
    "version": 3,
  }
  name = f"{task.name}_{files.digest(described)[:12]}.npz"
  path = pathlib.Path(options.cache) / name
  if not path.exists():
    say(f"generating {sum(sizes.values()):,} sequences of {task.name}")
  arrays = files.kept(path, described, lambda: make(options, sizes))
  return {
    part: Split(
      *(arrays[f"{part}_{key}"] for key in ("tokens", "lengths", "labels"))
    )
    for part in _SPLITS
  }


def _listops(options, sizes) -> dict[str, np.ndarray]:
  shorter = min(2000, options.length + 1)
  shape = listops.Shape(shorter_than=shorter, longer_than=shorter // 4)
  count = sum(sizes.values())
  # One draw without repeats, cut in three: no expression is in two parts.
  tokens, lengths, values = listops.generate(count, options.seed, shape)
  tokens = np.pad(tokens, ((0, 0), (0, options.length - tokens.shape[1])))
  return _cut(sizes, tokens, lengths, values)


def _pathfinder(options, sizes) -> dict[str, np.ndarray]:
  shape = pathfinder.Shape.level(options.level)
  pixels, labels = pathfinder.generate(sum(sizes.values()), options.seed, shape)
  lengths = np.full(len(labels), pixels.shape[1], np.int32)
  return _cut(sizes, pixels, lengths, labels)


def _cut(sizes, tokens, lengths, labels) -> dict[str, np.ndarray]:
  found, start = {}, 0
  for part, size in sizes.items():
    rows = slice(start, start + size)
    found[f"{part}_tokens"] = tokens[rows]
    found[f"{part}_lengths"] = lengths[rows]
    found[f"{part}_labels"] = labels[rows].astype(np.int32)
    start += size
  return found
