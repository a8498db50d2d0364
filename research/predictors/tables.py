"""Texts with numbers, from rows of files or of public sets.

A table keeps, beside the texts, the features that a tabular peer would be
given, groups that a split must not cut (one program measured often), and the
place of every row in its file.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.predictors import cells, reading
from research.predictors.cells import Spelling
from research.predictors.examples import Example

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """N texts with O numbers each.

  Attributes:
    texts: N.
    values: (N, O) float64, NaN where a number is missing.
    targets: names of the O numbers.
    groups: N names; a split keeps a group together.
    features: (N, F) float64 for tabular peers, NaN where a number is missing; F
      may be 0.
    feature_names: F, where they are known.
    columns: those that texts are written of, in their order, if they are.
    words: N texts that stand behind those columns, if there are any.
    places: N places in the file, such as "runs.csv line 7", where known.
    notes: lines on what was left out.
    parts: named split -> N times "train", "valid" or "test", for data that
      says itself what is held out.
    costs: name -> (N,) float64 that a compiler counted, for a peer that
      predicts times from them.
    sizes: name -> (N,) float64 that can be counted in the text, for a peer that
      is given nothing else.
    again: target -> (N,) float64 of a second measurement, the ceiling of what
      can be predicted.
    other_texts: (row, count, seed) -> so many other texts that mean the same;
      None where none is known.
  """

  texts: Sequence[str]
  values: np.ndarray
  targets: Sequence[str]
  groups: Sequence[str]
  features: np.ndarray
  feature_names: Sequence[str] = ()
  columns: Sequence[str] = ()
  words: Sequence[str] = ()
  places: Sequence[str] = ()
  notes: Sequence[str] = ()
  parts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  costs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  sizes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  again: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  other_texts: Callable[[int, int, int], Sequence[str]] | None = None

  def __len__(self) -> int:
    """N."""
    return len(self.texts)

  def place(self, row: int) -> str:
    """Where a row stands, for a message."""
    return self.places[row] if len(self.places) else f"row {row + 1}"

  def examples(self, indices: np.ndarray) -> list[Example]:
    """Some rows as examples; NaN becomes a missing objective."""
    return [
      Example(
        x=self.texts[i],
        y=[None if np.isnan(v) else float(v) for v in self.values[i]],
      )
      for i in indices
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How a file of a user is to be read.

  Attributes:
    text: column of texts; None writes the columns of a CSV file as
      "name: value", which are the features too.
    group: column of groups.
    columns: those that are read beside targets and group. Where empty, the text
      alone is read if a column of texts is named, else all.
    leave_out: columns that are neither text nor feature.
    delimiter: between the cells of a CSV file; None finds out.
    decimal: mark in front of decimals; None takes the point, and asks where
      cells may have decimal commas.
    missing: spellings of a missing value beside the usual ones.
  """

  text: str | None = None
  group: str | None = None
  columns: tuple[str, ...] = ()
  leave_out: tuple[str, ...] = ()
  delimiter: str | None = None
  decimal: str | None = None
  missing: tuple[str, ...] = ()

  @property
  def spelling(self) -> Spelling:
    """Of the cells."""
    return Spelling(decimal=self.decimal or ".", missing=self.missing)

  @property
  def settings(self) -> list[str]:
    """The named columns that stand in front of the text."""
    return [name for name in self.columns if name != self.text]


def read_jsonl(
  path: str | pathlib.Path,
  targets: Sequence[str],
  layout: Layout = Layout(text="x"),  # noqa: B008 (frozen)
) -> Table:
  """One JSON object a line; a target may be a number, null or absent.

  Raises:
    InputError: the file cannot be read, or a line does not do.
  """
  columns = layout.settings
  rows = reading.jsonl_rows(path, layout.text, as_written=bool(columns))
  if columns:
    rows = [_with_cells(path, row, columns) for row in rows]
    check_decimals(path, rows, columns, layout)
  return make_table(
    path,
    rows,
    targets,
    lambda row: text_of_row(row, columns, layout.text),
    layout.group and (lambda row: row[layout.group]),
    columns,
    spelling=layout.spelling,
    beside=layout.text,
  )


def _with_cells(path, row: Row, columns: Sequence[str]) -> Row:
  """A row of JSON whose columns are as a CSV file would have them."""
  lost = [name for name in columns if name not in row]
  if lost:
    raise InputError(
      f"{reading.place(path, row)}: has no {lost[0]!r}, but "
      f"{reading.some(row)}: mend --columns, or write null where it is missing"
    )
  told = {name: reading.cell(path, row, name) for name in columns}
  return reading.Row({**row, **told}, row.first, row.last)


def read_csv(
  path: str | pathlib.Path,
  targets: Sequence[str],
  layout: Layout = Layout(),  # noqa: B008 (frozen)
) -> Table:
  """A CSV file with a heading; empty cells of targets are missing.

  Raises:
    InputError: the file cannot be read, or a cell does not do.
  """
  rows = reading.csv_rows(path, layout.delimiter)
  names = list(rows[0])
  _check_columns(path, names, targets, layout)
  hidden = {*targets, *layout.leave_out, layout.group}
  asked = layout.settings or (names if layout.text is None else ())
  columns = [name for name in asked if name not in hidden]
  check_decimals(path, rows, [*targets, *columns], layout)
  if not columns and layout.text is None:
    raise InputError(
      f"{path}: has no column beside {', '.join(targets)} to predict from"
    )
  table = make_table(
    path,
    rows,
    targets,
    lambda row: text_of_row(row, columns, layout.text),
    layout.group and (lambda row: row[layout.group].strip()),
    columns,
    spelling=layout.spelling,
    beside=layout.text,
  )
  notes = []
  if rows.unnamed:
    notes.append(f"{rows.unnamed} columns without a name left out")
  unread = [n for n in names if n not in {*hidden, *columns, layout.text}]
  if unread:
    notes.append(f"not read: {reading.some(unread)}; --columns names more")
  return dataclasses.replace(table, notes=[*notes, *table.notes])


def text_of_row(
  row: Row, columns: Sequence[str], text: str | None = None
) -> str:
  """A row as a text: "lr: 0.1, depth: 3", and the cell of a column behind it.

  Args:
    row: of strings.
    columns: those in front, perhaps none.
    text: column of what stands behind, on lines of its own.
  """
  told = ", ".join(f"{name}: {row[name].strip()}" for name in columns)
  if text is None:
    return told
  return f"{told}\n{row[text]}" if columns else row[text]


def _check_columns(path, names, targets, layout: Layout) -> None:
  given = {
    "--targets": targets,
    "--text_column": [layout.text] if layout.text is not None else [],
    "--group_column": [layout.group] if layout.group else [],
    "--columns": layout.columns,
    "--leave_out": layout.leave_out,
  }
  for flag, columns in given.items():
    for name in columns:
      if name not in names:
        what = {"--targets": "target ", "--text_column": "column "}
        raise InputError(
          f"{path}: has no {what.get(flag, 'column ')}{name!r}, but "
          f"{reading.some(names)}: mend {flag}, or name what stands between "
          "the columns with --delimiter"
        )
  if layout.text in targets:
    raise InputError(f"--text_column={layout.text}: is a target: take another")


def check_decimals(path, rows, columns, layout: Layout) -> None:
  """Raises InputError where all of a column may be decimal commas."""
  if layout.decimal is not None:
    return
  comma = Spelling(decimal=",", missing=layout.missing)
  for name in columns:
    given = [row for row in rows if not comma.is_missing(row[name])]
    with_comma = [row for row in given if "," in row[name]]
    if with_comma and all(
      comma.number(row[name].replace(".", ",")) is not None for row in given
    ):
      cell = reading.shown(with_comma[0][name].strip())
      raise InputError(
        f"{reading.place(path, with_comma[0])}: {name} is {cell}: give "
        "--decimal=, if that is a decimal comma, else --decimal=."
      )


def make_table(
  path,
  rows: Sequence[Row],
  targets: Sequence[str],
  text: Callable[[Row], str],
  group: Callable[[Row], str] | None = None,
  features: Sequence[str] = (),
  *,
  spelling: Spelling = Spelling(),  # noqa: B008 (frozen)
  beside: str | None = None,
) -> Table:
  """Rows with their numbers parsed; those without any target are left out.

  Args:
    path: where the rows are from, for messages.
    rows: N, of `reading` or made.
    targets: columns of numbers.
    text: of a row.
    group: of a row; texts are the groups where it is not given.
    features: columns that tabular peers are given, of which texts are written.
    spelling: of the cells.
    beside: column of what stands in the texts behind those columns.

  Raises:
    InputError: a target is no number, or a text is empty; names the place.
  """
  if not targets:
    raise InputError(
      f"{path}: name at least one column of targets with --targets"
    )
  if not len(rows):
    raise InputError(f"{path}: has no row")
  for name in targets:
    if targets.count(name) > 1:
      raise InputError(f"--targets: {name!r} is named twice: leave one out")
    if not any(name in row for row in rows):
      raise InputError(
        f"{path}: has no target {name!r}, but "
        f"{reading.some(rows[0])}: mend --targets"
      )
  values = np.array(
    [[target_of(path, row, name, spelling) for name in targets] for row in rows]
  ).reshape(len(rows), len(targets))
  kept = np.flatnonzero(~np.isnan(values).all(axis=1))
  if not len(kept):
    raise InputError(
      f"{path}: no row has a target: name others with --targets; a trained "
      "model predicts such rows by predict_rlm.py"
    )
  notes = []
  if len(kept) < len(rows):
    notes.append(f"{len(rows) - len(kept)} rows without any target left out")
  rows = [rows[i] for i in kept]
  try:
    groups = [str(group(row)) for row in rows] if group else None
  except KeyError as error:
    raise InputError(
      f"{path}: has no column {error} of groups in every row"
    ) from error
  texts = [checked_text(path, row, text) for row in rows]
  found = cells.features(rows, features, spelling)
  if found.left_out:
    notes.append(f"peers are not given {', '.join(found.left_out)}")
  return Table(
    texts=texts,
    values=values[kept],
    targets=list(targets),
    groups=groups or texts,
    features=found.values,
    feature_names=found.names,
    columns=features,
    words=[row[beside] for row in rows] if features and beside else (),
    places=[reading.place(path, row) for row in rows],
    notes=notes,
  )


def target_of(path, row: Row, name: str, spelling: Spelling) -> float:
  """The number of a target, NaN where it is missing.

  Raises:
    InputError: it is no number; names the place and the flag that helps.
  """
  if name not in row:
    near = [k for k in row if isinstance(k, str) and k.lower() == name.lower()]
    if near:
      raise InputError(
        f"{reading.place(path, row)}: has {near[0]!r} in the place of {name!r}:"
        " rename it"
      )
  value = row.get(name)
  if spelling.is_missing(value):
    return math.nan
  number = spelling.number(value)
  if number is None:
    what = "which is no number"
    advice = "mend it, or give --missing if it stands for a missing value"
    if isinstance(value, bool):
      advice = "write 1 or 0"
    elif Spelling(decimal=",").number(value) is not None:
      advice = "give --decimal=, if that is a decimal comma"
    raise InputError(
      f"{reading.place(path, row)}: {name} is {reading.shown(value)}, {what}: "
      f"{advice}"
    )
  return number


def checked_text(path, row: Row, text: Callable[[Row], str]) -> str:
  """The text of a row.

  Raises:
    InputError: it is empty, or no Unicode; names the place.
  """
  found = text(row)
  where = reading.place(path, row)
  if not found.strip():
    raise InputError(f"{where}: its text is empty: fill it, or remove the row")
  try:
    found.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f"{where}: its text has half of a surrogate pair: mend it"
    ) from error
  return found
