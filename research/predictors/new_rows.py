"""Rows to predict, as the texts that a model was trained on.

A table without its targets, or with some of them: CSV or JSON lines. Columns,
their order and the mark of decimals are those of training, however the file has
them, and everything else of a cell stays as it is.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import InputError
from research.predictors import cells, reading, seen, tables
from research.predictors.reading import Row
from research.predictors.seen import Column
from research.predictors.tables import Layout


@dataclasses.dataclass(frozen=True, eq=False)
class NewRows:
  """N rows to predict.

  Attributes:
    texts: N.
    cells: N, by column, as the file has them.
    names: all columns of the file, in order.
    notes: lines that a user should know.
  """

  texts: Sequence[str]
  cells: Sequence[Mapping[str, Any]]
  names: Sequence[str]
  notes: Sequence[str] = ()

  def __len__(self) -> int:
    """N."""
    return len(self.texts)


def read(
  path: str | pathlib.Path,
  targets: Sequence[str],
  trained: Layout,
  columns: Sequence[Column] | None,
  given: Layout = Layout(),  # noqa: B008 (frozen)
  *,
  any_cell: bool = False,
) -> NewRows:
  """Reads a file as a model's training read its own.

  Args:
    path: of CSV or of JSON lines.
    targets: what is predicted; no part of the text, if they are there.
    trained: how the file of training was read.
    columns: what texts are written of, or begin with where `trained` names a
      column of texts, too; None takes those that `given` and `trained` say.
    given: what differs in this file: the mark of decimals, the delimiter,
      spellings of missing values, the column of texts, columns to leave out
      without a word.
    any_cell: take cells that are unlike all of training by mistake.

  Raises:
    InputError: the file cannot be read, has not all columns, or a cell does
      not do; names the place and the flag that helps.
  """
  text = given.text or trained.text
  delimiter = given.delimiter or trained.delimiter
  rows = reading.any_rows(path, text, delimiter)
  names = list(dict.fromkeys(name for row in rows for name in row))
  if text is not None:
    _check_there(path, rows, names, [text], "--text_column")
    columns = columns if trained.settings else ()
  hidden = {*targets, *trained.leave_out, *given.leave_out, trained.group}
  if columns is None:
    asked = given.columns or trained.settings
    columns = [
      Column(name=name, words=None, gaps=True)
      for name in asked or names
      if name not in hidden
    ]
  if not columns and text is None:
    raise InputError(
      f"{path}: has no column beside {reading.some(targets)} to predict from"
    )
  wanted = [column.name for column in columns]
  asked = set(given.settings) - {*targets, text}
  if asked and asked != set(wanted):
    raise InputError(
      f"--columns={','.join(given.columns)}: the model reads "
      f"{reading.some(wanted)}: leave the flag out"
    )
  _check_there(path, rows, names, wanted, "--delimiter")
  decimal = given.decimal or trained.decimal
  here = Layout(decimal=decimal, missing=trained.missing + given.missing)
  made = [_strings(path, row, columns, text) for row in rows]
  tables.check_decimals(path, made, wanted, here)
  notes = _check_cells(path, made, columns, here.spelling, any_cell)

  def write(row: Row) -> str:
    written = {
      n: _as_trained(row[n], here.spelling, trained.spelling) for n in wanted
    }
    return tables.text_of_row({**row, **written}, wanted, text)

  texts = [tables.checked_text(path, row, write) for row in made]
  more = [name for name in names if name not in {*wanted, *hidden, text}]
  if more:
    notes.append(
      f"not read, as the model was trained without: {reading.some(more)}"
    )
  return NewRows(texts, rows, names, notes)


def _check_there(path, rows, names, wanted: Sequence[str], flag: str) -> None:
  """Raises InputError where a row lacks a column."""
  for row in rows:
    lost = [name for name in wanted if name not in row]
    if lost:
      # A heading stands for all rows, but every JSON line for itself.
      is_some = any(lost[0] in other for other in rows)
      where = reading.place(path, row) if is_some else path
      advice = {
        "--delimiter": "add what is missing, or name what stands between the "
        "columns with --delimiter",
        "--text_column": "name the column of texts with --text_column",
      }
      raise InputError(
        f"{where}: has no column {reading.some(lost)}, which the model reads, "
        f"but {reading.some(names)}: {advice[flag]}"
      )


def _strings(
  path, row: Row, columns: Sequence[Column], text: str | None
) -> Row:
  """The cells that are read, as a CSV file would have them."""
  found = {
    column.name: reading.cell(path, row, column.name, column.words or ())
    for column in columns
  }
  if text is not None:
    found[text] = row[text]
  return Row(found, row.first, row.last)


def _check_cells(
  path, rows, columns, spelling: cells.Spelling, any_cell: bool
) -> list[str]:
  """Notes on cells unlike all of training; raises InputError for mistakes."""
  notes = []
  for column in columns:
    found: dict[str, list] = {}
    for row in rows:
      if how := column.unlike(row[column.name], spelling):
        found.setdefault(how, []).append(row)
    for how, where in found.items():
      place = reading.place(path, where[0])
      cell = reading.shown(where[0][column.name].strip())
      if how in seen.MISTAKES and not any_cell:
        raise InputError(
          f"{place}: {column.name} is {cell}, {how}: mend it"
          f"{_other_decimal(where[0][column.name], spelling)}, or give "
          "--any_cell to take it as it is"
        )
      notes.append(
        f"{column.name}: {len(where)} of {len(rows)} rows are {how}"
        f" ({column.told()}), first {cell} at {place}"
      )
  return notes


def _other_decimal(cell: str, spelling: cells.Spelling) -> str:
  """Advice, where a cell were a number with the other mark of decimals."""
  other = "," if spelling.decimal == "." else "."
  found = dataclasses.replace(spelling, decimal=other).number(cell)
  return "" if found is None else f", give --decimal={other}"


def _as_trained(
  cell: str, here: cells.Spelling, trained: cells.Spelling
) -> str:
  """A cell with the mark of decimals that training knew."""
  if here.decimal == trained.decimal or here.number(cell) is None:
    return cell
  return cell.replace(here.decimal, trained.decimal)
