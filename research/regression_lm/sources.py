"""Where a training run has its examples from."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from models.errors import InputError
from research.predictors import public_sets as shared_sets
from research.predictors import tables
from research.predictors.tables import Split, Table
from research.regression_lm import examples, prompts
from research.regression_lm.api import RegressionLM
from research.regression_lm.density import task as density_task
from research.regression_lm.examples import Dataset, Example

DENSITY = "density"
KINDS = ("jsonl", "csv", *shared_sets.SETS, DENSITY)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Examples as a run takes them.

  Attributes:
    batch_at: step -> batch, a pure function.
    valid: held-out examples, or None.
    values: (N, O) training targets, for losses over a grid.
    scored: `batch_at` for a `Scale`, whose batches have "scores".
  """

  batch_at: Callable[[int], dict[str, np.ndarray]]
  valid: Dataset | None
  values: np.ndarray
  scored: Callable[[Any], Callable[[int], dict[str, np.ndarray]]]


class Source(Protocol):
  """What `training` asks of a source."""

  num_objectives: int

  def texts(self) -> Sequence[str]:
    """Training texts, to learn a tokenizer from."""

  def prepare(self, lm: RegressionLM, rows: int, seed: int) -> Prepared:
    """Tokenizes for a model."""

  def describe(self) -> dict[str, Any]:
    """JSON values that say which examples these are, without paths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
  """Which part of which data; the path is not part of it.

  Attributes:
    kind: one of `KINDS`.
    targets: columns to predict, in order.
    text: column of texts, for jsonl, csv and programs.
    group: column of groups, for jsonl and csv.
    by_group: keep groups on one side of the split.
    train: share of the rows (or groups), or their number.
    valid: likewise.
    test: rows of the test part at most; 0 takes all.
    split_seed: of the split.
    named: a split that the data brings with it; then `train` and `test` only
      cap the rows (a share of `train` caps nothing), and `valid` and
      `by_group` say nothing.
    prompt_shots: up to so many other examples of the same group stand in front
      of a text; of any group where no two rows share one.
    text_copies: texts that stand for a row of the training part, its own among
      them; of programs in Python alone. The other parts keep one.
  """

  kind: str
  targets: tuple[str, ...] = ()
  text: str | None = None
  group: str | None = None
  by_group: bool = False
  train: float = 0.8
  valid: float = 0.1
  test: int = 0
  split_seed: int = 0
  named: str | None = None
  prompt_shots: int = 0
  text_copies: int = 1

  def load(self, path: str) -> Table:
    """Reads the table.

    Raises:
      InputError: it cannot be read, or its texts have no copies.
    """
    table = shared_sets.load(
      self.kind, path, self.targets, text=self.text, group=self.group
    )
    if self.text_copies > 1 and table.other_texts is None:
      raise _no_copies(self)
    if self.text_copies > 1 and self.prompt_shots:
      raise InputError(
        "--text_copies and --prompt_shots: a copy in front of a text would "
        "tell its numbers: give one of them"
      )
    return table

  def split(self, table: Table, train: float | None = None) -> Split:
    """Its parts; `train` overrides the option.

    Raises:
      InputError: there are too few rows.
    """
    train = self.train if train is None else train
    if self.named is not None:
      return tables.named_split(
        table,
        self.named,
        seed=self.split_seed,
        train=int(train) if train >= 1 else 0,
        test=self.test,
      )
    return tables.split(
      table,
      train=train,
      valid=self.valid,
      seed=self.split_seed,
      by_group=self.by_group,
      test=self.test or None,
    )


def _no_copies(options: DataOptions) -> InputError:
  text = f" --text_column={options.text}" if options.text else ""
  return InputError(
    f"--text_copies={options.text_copies}: --data={options.kind}{text} knows "
    "one text a row: leave it at 1, or take --data=programs with "
    "--text_column=source, typed or sized"
  )


@dataclasses.dataclass(frozen=True, eq=False)
class TableSource:
  """The training part of a table, and its validation part.

  Attributes:
    table: all rows.
    parts: its split.
    options: which data this is.
  """

  table: Table
  parts: Split
  options: DataOptions

  @property
  def num_objectives(self) -> int:
    """O."""
    return len(self.table.targets)

  def texts(self) -> list[str]:
    """Those of the training part alone, without copies."""
    return [self.table.texts[i] for i in self.parts.train]

  def prepare(self, lm: RegressionLM, rows: int, seed: int) -> Prepared:
    """Tokenizes both parts, the training part with its copies."""
    train, valid = lm.datasets(
      self._copied(self.parts.train, seed),
      self._examples(self.parts.valid),
      self.options.prompt_shots,
    )
    values = lm.model.codec.values(train.targets)

    def scored(scale):
      data = dataclasses.replace(train, scores=scale.scores(values))
      return lambda step: data.batch_at(step, rows, seed)

    return Prepared(
      lambda step: train.batch_at(step, rows, seed), valid, values, scored
    )

  def questions(self, lm: RegressionLM) -> list[str]:
    """Texts of the test part, behind known examples where there are prompts."""
    asked = self._examples(self.parts.test)
    shots = self.options.prompt_shots
    if not shots:
      return [example.x for example in asked]
    known: dict[str, list] = {}
    for part in (self.parts.train, self.parts.valid):
      for example in self._examples(part):
        known.setdefault(example.task, []).append(example)
    found = [example.x for example in asked]
    for task, given in known.items():
      places = [i for i, example in enumerate(asked) if example.task == task]
      if places:
        prompt = prompts.Prompt(examples=given, shots=shots, choose="random")
        texts = lm.prompted([asked[i] for i in places], prompt)
        for place, text in zip(places, texts):
          found[place] = text
    return found

  def _examples(self, indices: np.ndarray) -> list[Example]:
    """Rows as examples, whose tasks are the groups, if these are any."""
    groups = self.table.groups
    tasks = groups if len(set(groups)) < len(groups) else [""] * len(groups)
    return [
      dataclasses.replace(example, task=tasks[i])
      for i, example in zip(indices, self.table.examples(indices))
    ]

  def _copied(self, indices: np.ndarray, seed: int) -> list[Example]:
    """`_examples`, each followed by its copies."""
    others = self.options.text_copies - 1
    found = self._examples(indices)
    if not others:
      return found
    return [
      dataclasses.replace(example, x=text)
      for i, example in zip(indices, found)
      for text in (example.x, *self.table.other_texts(i, others, seed))
    ]

  def describe(self) -> dict[str, Any]:
    """The options, and a digest of the training rows."""
    digest = hashlib.sha256()
    for i in self.parts.train:
      digest.update(self.table.texts[i].encode())
      digest.update(self.table.values[i].tobytes())
    options = dataclasses.asdict(self.options)
    options["targets"] = list(options["targets"])
    return options | {"digest": digest.hexdigest()[:16]}


@dataclasses.dataclass(frozen=True)
class DensitySource:
  """The synthetic task of `density_task`: examples without end."""

  num_objectives = 2

  def texts(self) -> list[str]:
    """Some texts."""
    return density_task.drawn_at(0, 256, 0)[0]

  def prepare(self, lm: RegressionLM, rows: int, seed: int) -> Prepared:
    """Examples are made as they are asked for; validation has other ones.

    Raises:
      InputError: `rows` cannot be cut into texts with their points.
    """
    if rows % density_task.POINTS:
      raise InputError(
        f"--batch={rows} is no multiple of {density_task.POINTS}, the points "
        "of a text: change it"
      )
    texts = rows // density_task.POINTS
    codec, seen = lm.model.codec, {}

    def written(points: np.ndarray) -> np.ndarray:
      """Targets (rows, T) of points to four decimals, most of them known."""
      values = np.round(points, 4).ravel().tolist()
      new = [value for value in set(values) if value not in seen]
      ids = codec.encode([[value] for value in new])
      seen.update(zip(new, ids[:, : codec.format.length]))
      return np.stack([seen[value] for value in values]).reshape(rows, -1)

    def batch_at(step):
      names, clouds = density_task.drawn_at(step, texts, seed)
      read = examples.read_texts(lm.tokenizer, names, lm.max_length)
      tokens, lengths = read.rows(np.arange(texts))
      targets = written(clouds)
      return {
        "tokens": tokens,
        "lengths": lengths,
        "targets": targets.reshape(texts, density_task.POINTS, -1),
      }

    def scored(scale):
      raise InputError(
        "--data=density has many numbers a text, whose expected value says "
        "little: leave --expected_value and --ranking at 0"
      )

    held_out = density_task.examples_at(0, 64, seed + 1)
    values = np.array([example.y for example in held_out])
    return Prepared(batch_at, lm.dataset(held_out), values, scored)

  def describe(self) -> dict[str, Any]:
    """Its name."""
    return {"kind": DENSITY}


def check_same(source: TableSource, described: dict[str, Any]) -> None:
  """Checks that a model was trained on this very split.

  Else rows that it was trained on might be in the test.

  Raises:
    InputError: the rows are others.
  """
  found = source.describe()["digest"]
  if found != described.get("digest"):
    raise InputError(
      f"--path: its training rows ({found}) are not those of the model "
      f"({described.get('digest')}): give the file it was trained on"
    )


def open_source(options: DataOptions, path: str | None) -> Source:
  """The source that options and a path name.

  Raises:
    InputError: the data cannot be read.
  """
  if options.kind == DENSITY:
    if options.text_copies > 1:
      raise _no_copies(options)
    if options.prompt_shots:
      raise InputError(
        "--prompt_shots: --data=density has no examples of one task: leave it "
        "at 0"
      )
    return DensitySource()

  if not path:
    raise InputError(
      f"--data={options.kind} needs --path of its file or folder"
    )
  table = options.load(path)
  return TableSource(table, options.split(table), options)
