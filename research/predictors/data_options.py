"""Which rows of which data are for training, validation and the test."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from research.predictors import splits
from research.predictors.splits import Split
from research.predictors.tables import Layout, Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
  """Which part of which data; the path is not part of it.

  Attributes:
    kind: "jsonl", "csv", or the name of a set.
    targets: columns to predict, in order.
    text: column of texts, for jsonl, csv and programs.
    group: column of groups, for jsonl and csv.
    columns: of csv that are read beside targets and group; all where empty.
    leave_out: columns of csv that are neither text nor feature.
    delimiter: between the cells of csv; None finds out.
    decimal: mark in front of the decimals of csv.
    missing: spellings of a missing value beside the usual ones.
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
  columns: tuple[str, ...] = ()
  leave_out: tuple[str, ...] = ()
  delimiter: str | None = None
  decimal: str | None = None
  missing: tuple[str, ...] = ()
  by_group: bool = False
  train: float = 0.8
  valid: float = 0.1
  test: int = 0
  split_seed: int = 0
  named: str | None = None
  prompt_shots: int = 0
  text_copies: int = 1

  @classmethod
  def from_json(cls, described: Mapping[str, Any]) -> Self:
    """The options that a model was trained with, as its `info` keeps them."""
    names = {field.name for field in dataclasses.fields(cls)}
    found = {name: v for name, v in described.items() if name in names}
    lists = {name: tuple(v) for name, v in found.items() if isinstance(v, list)}
    return cls(**(found | lists))

  def layout(self, text: str | None = None) -> Layout:
    """How a file of rows is read; `text` stands where no column is named."""
    return Layout(
      text=self.text or text,
      group=self.group,
      columns=self.columns,
      leave_out=self.leave_out,
      delimiter=self.delimiter,
      decimal=self.decimal,
      missing=self.missing,
    )

  def split(self, table: Table, train: float | None = None) -> Split:
    """Its parts; `train` overrides the option.

    Raises:
      InputError: there are too few rows.
    """
    train = self.train if train is None else train
    if self.named is not None:
      return splits.named_split(
        table,
        self.named,
        seed=self.split_seed,
        train=int(train) if train >= 1 else 0,
        test=self.test,
      )
    return splits.split(
      table,
      train=train,
      valid=self.valid,
      seed=self.split_seed,
      by_group=self.by_group,
      test=self.test or None,
    )
