"""Rows with their predictions, as a file."""

import csv
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from models.errors import InputError
from research.core import files
from research.predictors import reading
from research.predictors.new_rows import NewRows

SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": None}


def check_out(path: str | None, overwrite: bool) -> pathlib.Path:
  """The file to write, looked at before anything is computed.

  Raises:
    InputError: it has no name that says what to write, or is there.
  """
  endings = ", ".join(SUFFIXES)
  if not path:
    raise InputError(f"--out: name the file to write, one of {endings}")
  found = pathlib.Path(path).expanduser()
  if found.suffix.lower() not in SUFFIXES:
    raise InputError(f"--out={path}: give a name that ends in {endings}")
  if found.is_dir() or (found.exists() and not overwrite):
    raise InputError(
      f"--out={path}: exists and is not overwritten: give another name, or "
      "--overwrite"
    )
  return found


def write(
  out: pathlib.Path,
  rows: NewRows,
  found: Iterator[Sequence[Mapping[str, Any]]],
  names: Sequence[str],
  *,
  keep: Sequence[str] | None = None,
  delimiter: str | None = None,
  decimal: str = ".",
  advance: Callable[[int], None] = lambda more: None,
) -> None:
  """Writes rows with their predictions; the file appears whole or not at all.

  Args:
    out: a .csv, .tsv or .jsonl file.
    rows: N.
    found: predictions, in batches.
    names: of their columns.
    keep: columns of the rows that are copied; None copies all.
    delimiter: of .csv; the comma if None.
    decimal: mark of decimals of predictions in .csv and .tsv.
    advance: told how many rows more are done.

  Raises:
    InputError: a column is not there, or has the name of a prediction.
  """
  copied = rows.names if keep is None else list(keep)
  for name in copied:
    if name not in rows.names:
      raise InputError(
        f"--keep: there is no column {name!r}, but {reading.some(rows.names)}"
      )
    if name in names:
      raise InputError(
        f"the rows have a column {name!r} already: give the columns to copy "
        "with --keep, or rename it"
      )
  ending = out.suffix.lower()
  # Half of a surrogate pair, which JSON may hold, is no UTF-8.
  how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
  with files.whole(out) as draft, open(draft, "w", **how) as file:
    if ending == ".jsonl":
      put = lambda line: file.write(json.dumps(_values(line)) + "\n")
    else:
      by = delimiter if delimiter and ending == ".csv" else SUFFIXES[ending]
      table = csv.writer(file, delimiter=by, lineterminator="\n")
      table.writerow([*copied, *names])
      put = lambda line: table.writerow(
        [_cell(line.get(name), decimal) for name in (*copied, *names)]
      )
    done = 0
    for batch in found:
      for more in batch:
        row = rows.cells[done]
        put({n: row[n] for n in copied if n in row}
            | {n: more[n] for n in names})  # fmt: skip
        done += 1
      advance(len(batch))


def _values(line: Mapping[str, Any]) -> dict[str, Any]:
  """A line as JSON can hold it."""
  return {name: _value(value) for name, value in line.items()}


def _value(value: Any) -> Any:
  if isinstance(value, reading.Digits):
    value = json.loads(value)
  if isinstance(value, list):
    return [_value(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else str(value)
  return value


def _cell(value: Any, decimal: str) -> str:
  """A cell of CSV; a list is numbers with spaces between them."""
  if value is None:
    return ""
  if isinstance(value, str):
    return value
  if isinstance(value, float):
    return repr(value).replace(".", decimal)
  if isinstance(value, list) and all(
    item is None or isinstance(item, float) for item in value
  ):
    return " ".join(_cell(item, decimal) or "nan" for item in value)
  return json.dumps(value)
