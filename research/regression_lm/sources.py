"""Tables as sources of examples, and the sources that flags name."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from models.errors import InputError
from models.numbers import NumberFormat
from research.predictors import seen, summary, tables
from research.predictors.data_options import DataOptions
from research.predictors.examples import Example
from research.predictors.splits import Split
from research.predictors.tables import Table
from research.regression_lm import data_sets, prompts
from research.regression_lm.api import RegressionLM
from research.regression_lm.density.source import DensitySource
from research.regression_lm.source import Prepared, Source


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

  def check(self, numbers: NumberFormat) -> None:
    """Raises InputError where a number format cannot hold the targets."""
    data_sets.check_targets(self.table, self.parts, numbers)

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

  def held_out(self) -> list[Example]:
    """Examples for validation."""
    return self._examples(self.parts.valid)

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

  def summary(self) -> list[str]:
    """Rows, targets, text, features, and repeats across the split."""
    return summary.lines(self.table, self.parts)

  def columns(self) -> list[dict[str, Any]] | None:
    """What the training part shows of the columns of its texts."""
    found = seen.columns(self.table, self.parts.train)
    return found and [column.to_json() for column in found]

  def describe(self) -> dict[str, Any]:
    """The options, and a digest of the training rows."""
    digest = hashlib.sha256()
    for i in self.parts.train:
      digest.update(self.table.texts[i].encode())
      digest.update(self.table.values[i].tobytes())
    options = {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in dataclasses.asdict(self.options).items()
    }
    # Fields that came after the first models are left out where they are empty,
    # so that these models still compare equal.
    for field in dataclasses.fields(tables.Layout):
      if field.name not in ("text", "group") and not options[field.name]:
        del options[field.name]
    return options | {"digest": digest.hexdigest()[:16]}


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


def open_source(
  options: DataOptions, path: str | None, table: Table | None = None
) -> Source:
  """The source that options and a path name.

  Args:
    options: which data.
    path: of its file or folder.
    table: of the file, if it was read already.

  Raises:
    InputError: the data cannot be read.
  """
  if options.kind == data_sets.DENSITY:
    if options.text_copies > 1:
      raise data_sets.no_copies(options)
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
  if table is None:
    table = data_sets.load(options, path)
  return TableSource(table, options.split(table), options)
