"""Texts with numbers, read from files: JSONL, CSV, and shared sets by name.

A table keeps, beside the texts, the numeric features that a tabular peer would
be given, and groups that a split must not cut (one program measured often).
"""

import csv
import dataclasses
import gzip
import io
import json
import lzma
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.predictors.examples import Example

Row = Mapping[str, Any]
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """N texts with O numbers each.

  Attributes:
    texts: N.
    values: (N, O) float64, NaN where a number is missing.
    targets: names of the O numbers.
    groups: N names; a split keeps a group together.
    features: (N, F) float64 for tabular peers; F may be 0.
    parts: named split -> N times "train", "valid" or "test", for data that
      says itself what is held out.
    costs: name -> (N,) float64 that a compiler counted, for a peer that
      predicts times from them.
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
  parts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  costs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  again: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  other_texts: Callable[[int, int, int], Sequence[str]] | None = None

  def __len__(self) -> int:
    """N."""
    return len(self.texts)

  def examples(self, indices: np.ndarray) -> list[Example]:
    """Some rows as examples; NaN becomes a missing objective."""
    return [
      Example(
        x=self.texts[i],
        y=[None if np.isnan(v) else float(v) for v in self.values[i]],
      )
      for i in indices
    ]


def read_jsonl(
  path: str | pathlib.Path,
  targets: Sequence[str],
  *,
  text: str = "x",
  group: str | None = None,
) -> Table:
  """One JSON object a line; a target may be a number, null or absent.

  Raises:
    InputError: the file cannot be read, or a line does not do.
  """
  rows = jsonl_rows(path, text)
  return make_table(
    path, rows, targets, lambda row: row[text], group and (lambda r: r[group])
  )


def jsonl_rows(path: str | pathlib.Path, text: str) -> list[dict[str, Any]]:
  """The objects of a JSONL file, each with a text in the column `text`.

  Raises:
    InputError: the file cannot be read, or a line does not do.
  """
  rows = []
  for number, line in enumerate(read_lines(path), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict):
      raise InputError(f"{path} line {number}: is no JSON object: mend it")
    if not isinstance(row.get(text), str):
      raise InputError(
        f"{path} line {number}: has no text {text!r}, but "
        f"{_some(row)}: name the column of texts"
      )
    rows.append(row)
  return rows


def read_csv(
  path: str | pathlib.Path,
  targets: Sequence[str],
  *,
  text: str | None = None,
  group: str | None = None,
  leave_out: Sequence[str] = (),
) -> Table:
  """A CSV file with a heading.

  Args:
    path: of the file; .gz and .xz are unpacked.
    targets: columns of numbers; empty cells are missing.
    text: column of texts; None writes the other columns as "name: value" lines,
      which are the features too where they are numbers.
    group: column of groups.
    leave_out: columns that are neither text nor feature.

  Raises:
    InputError: the file cannot be read, or a cell does not do.
  """
  rows = csv_rows(path)
  hidden = {*targets, *leave_out, *([group] if group else [])}
  columns = [name for name in rows[0] if name not in hidden]
  if text is not None and text not in rows[0]:
    raise InputError(f"{path}: has no column {text!r}, but {_some(rows[0])}")
  write = lambda row: ", ".join(f"{name}: {row[name]}" for name in columns)
  return make_table(
    path,
    rows,
    targets,
    write if text is None else (lambda row: row[text]),
    group and (lambda row: row[group]),
    () if text is not None else columns,
  )


def csv_rows(path: str | pathlib.Path) -> list[dict[str, str]]:
  """All rows of a CSV file.

  Raises:
    InputError: it cannot be read, has no row, or a row is too short.
  """
  reader = csv.DictReader(io.StringIO("\n".join(read_lines(path))))
  try:
    rows = list(reader)
  except csv.Error as error:
    raise InputError(f"{path}: is no CSV file ({error})") from error
  if not rows:
    raise InputError(f"{path}: has no row below its heading")
  for number, row in enumerate(rows, 2):
    if None in row or None in row.values():
      raise InputError(
        f"{path} line {number}: has not as many cells as the heading"
      )
  return rows


def read_lines(path: str | pathlib.Path) -> list[str]:
  """The lines of a text file, .gz and .xz unpacked.

  Raises:
    InputError: it is missing, cut short, or no UTF-8 text.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise InputError(f"{path}: no such file")
  opener = _OPENERS.get(path.suffix, open)
  try:
    with opener(path, "rt", encoding="utf-8") as file:
      return file.read().split("\n")
  except UnicodeDecodeError as error:
    raise InputError(f"{path}: is not UTF-8 text: convert it") from error
  except (OSError, EOFError, lzma.LZMAError) as error:
    raise InputError(
      f"{path}: cannot be read, or was cut short: get the file again"
    ) from error


def make_table(
  path,
  rows: Sequence[Row],
  targets: Sequence[str],
  text: Callable[[Row], str],
  group: Callable[[Row], str] | None = None,
  features: Sequence[str] = (),
) -> Table:
  """Rows with their numbers parsed; those without any target are left out."""
  if not targets:
    raise InputError(f"{path}: name at least one column of targets")
  for name in targets:
    if not any(name in row for row in rows):
      raise InputError(
        f"{path}: has no target {name!r}, but {_some(rows[0] if rows else {})}"
      )
  values = np.array(
    [
      [_number(path, i, name, row.get(name)) for name in targets]
      for i, row in enumerate(rows)
    ]
  ).reshape(len(rows), len(targets))
  kept = np.flatnonzero(~np.isnan(values).all(axis=1))
  if not len(kept):
    raise InputError(f"{path}: no row has a target")
  rows = [rows[i] for i in kept]
  try:
    groups = [str(group(row)) for row in rows] if group else None
  except KeyError as error:
    raise InputError(f"{path}: has no column {error} of groups") from error
  texts = [text(row) for row in rows]
  return Table(
    texts=texts,
    values=values[kept],
    targets=list(targets),
    groups=groups or texts,
    features=_features(rows, features),
  )


def _number(path, row: int, name: str, value: Any) -> float:
  if value is None or value == "":
    return np.nan
  try:
    return float(value)
  except (TypeError, ValueError) as error:
    raise InputError(
      f"{path} row {row + 1}: {name} is {value!r}, which is no number"
    ) from error


def _features(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
  """Columns that are numbers in every row."""
  columns = []
  for name in names:
    try:
      columns.append([float(row[name]) for row in rows])
    except (TypeError, ValueError):
      continue
  return np.array(columns, np.float64).reshape(len(columns), len(rows)).T


def _some(row: Row) -> str:
  """The first names of a row, for a message."""
  names = [str(name) for name in row][:12]
  return ", ".join(names) if names else "nothing"
