"""Files of users as rows: text of any usual packing, CSV, JSON lines.

All tables are read here. A row knows its lines in the file, so that whatever is
wrong with it can be told with its place.
"""

import collections
import csv
import io
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from models import errors, input_files
from models.errors import InputError

_OTHERS = {
  b"\x28\xb5\x2f\xfd": "Zstandard",
  b"PK\x03\x04": "a ZIP archive or a spreadsheet",
  b"PAR1": "Parquet",
  b"\x89HDF": "HDF5",
  b"\x93NUMPY": "a NumPy array",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
DELIMITERS = (",", ";", "\t", "|")
_NO_NAME = re.compile(r"(Unnamed: \d+(_level_\d+)?)?")
_SEPARATOR = re.compile(r"sep=(.)\n")
# Digits of the longest integer that a float64 holds.
_DIGITS = 309


class Row(collections.UserDict):
  """Cells by column, and the lines of the file that they stand on."""

  def __init__(self, cells: dict[str, Any], first: int, last: int):
    """Puts them together; lines count from 1."""
    super().__init__(cells)
    self.first, self.last = first, last


class Digits(str):
  """A number of a JSON file as it stands there, such as "1.50"."""

  def __repr__(self) -> str:
    """As in the file, without quotes."""
    return str(self)


class Rows(list[Row]):
  """Rows of a file, and how many of its columns without a name are left out."""

  unnamed: int = 0


def place(path: Any, row: Any) -> str:
  """Where a row stands: "runs.csv line 7"."""
  if not isinstance(row, Row):
    return str(path)
  if row.first == row.last:
    return f"{path} line {row.first}"
  return f"{path} lines {row.first} to {row.last}"


def read_text(path: str | pathlib.Path) -> str:
  """A text file, unpacked if its first bytes are of gzip, xz or bzip2.

  UTF-8 with or without a mark, or UTF-16 with one; every end of a line is "\n".

  Raises:
    InputError: it is missing, cut short, or no such text.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise InputError(f"{path}: no such file")
  data = input_files.read_bytes(path)
  for first, name in _OTHERS.items():
    if data.startswith(first):
      raise InputError(
        f"{path}: is {name}, which is not read: give CSV or JSON lines, as they"
        " are or packed by gzip, xz or bzip2"
      )
  encoding = "utf-16" if data[:2] in _UTF16 else "utf-8-sig"
  text = input_files.decoded(path, data, encoding)
  return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | pathlib.Path) -> list[str]:
  """The lines of `read_text`; raises InputError likewise."""
  return read_text(path).split("\n")


def csv_rows(path: str | pathlib.Path, delimiter: str | None = None) -> Rows:
  """All rows of a CSV file with a heading.

  Columns without a name, such as the index that pandas writes, are left out,
  and so are lines that begin with "#" in front of the heading. Spaces around
  names and cells are, too.

  Args:
    path: of the file.
    delimiter: between cells; None takes the comma, or another of `DELIMITERS`
      where the heading has no comma.

  Raises:
    InputError: it cannot be read, has no row, names a column twice, or a row
      has not as many cells as the heading.
  """
  text = read_text(path)
  # Excel may say in front how it separates cells.
  if found := _SEPARATOR.match(text):
    text, delimiter = "\n" + text[found.end() :], delimiter or found[1]
  records = list(_records(path, text, delimiter or _delimiter(text)))
  while len(records) > 1 and _is_comment(records):
    records.pop(0)
  if len(records) < 2:
    raise InputError(f"{path}: has no row below its heading")
  names = [name.strip() for name in records[0][0]]
  kept = [i for i, name in enumerate(names) if not _NO_NAME.fullmatch(name)]
  for i in kept:
    if names.index(names[i]) != i:
      raise InputError(
        f"{path}: two columns are named {names[i]!r}: rename or remove one"
      )
  rows = Rows()
  rows.unnamed = len(names) - len(kept)
  for cells, first, last in records[1:]:
    row = Row({}, first, last)
    if len(cells) < len(names) or any(c.strip() for c in cells[len(names) :]):
      raise InputError(
        f"{place(path, row)}: has {len(cells)} cells, the heading "
        f"{len(names)}: mend it{_quotes(row)}"
      )
    row.update({names[i]: cells[i] for i in kept})
    rows.append(row)
  return rows


def _records(
  path: Any, text: str, delimiter: str
) -> Iterator[tuple[list[str], int, int]]:
  """Cells, first and last line of every record that is not empty."""
  before = csv.field_size_limit(sys.maxsize)  # Programs are long.
  try:
    reader = csv.reader(
      io.StringIO(text), delimiter=delimiter, skipinitialspace=True
    )
    while True:
      first = reader.line_num + 1
      cells = next(reader, None)
      if cells is None:
        return
      if any(cell.strip() for cell in cells):
        yield cells, first, reader.line_num
  except csv.Error as error:
    raise InputError(f"{path}: is no CSV file ({error})") from error
  finally:
    csv.field_size_limit(before)


def _delimiter(text: str) -> str:
  lines = (line for line in text.split("\n") if line.strip())
  heading = next((line for line in lines if not line.startswith("#")), "")
  if "," in heading:
    return ","
  return max(DELIMITERS, key=heading.count)


def _is_comment(records: Sequence[tuple[list[str], int, int]]) -> bool:
  (heading, _, _), (after, _, _) = records[:2]
  return heading[0].startswith("#") and len(heading) != len(after)


def _quotes(row: Row) -> str:
  return ", or close its quotes" if row.first < row.last else ""


def any_rows(
  path: str | pathlib.Path, text: str | None, delimiter: str | None = None
) -> Rows:
  """Rows of CSV or of JSON lines, whichever a file is, with cells as written.

  Args:
    path: of the file.
    text: column of texts that every row must have; None for none.
    delimiter: as for `csv_rows`.

  Raises:
    InputError: as `csv_rows` and `jsonl_rows`.
  """
  path = pathlib.Path(path).expanduser()
  is_json = ".json" in path.name.lower()
  if not is_json and not read_text(path).lstrip().startswith("{"):
    return csv_rows(path, delimiter)
  rows = Rows(jsonl_rows(path, text, as_written=True))
  if not rows:
    raise InputError(f"{path}: has no row")
  return rows


def jsonl_rows(
  path: str | pathlib.Path, text: str | None, *, as_written: bool = False
) -> list[Row]:
  """The objects of a file of JSON lines, each with a text in column `text`.

  Args:
    path: of the file.
    text: column of texts; None asks for none.
    as_written: numbers are `Digits`.

  Raises:
    InputError: the file cannot be read, or a line does not do.
  """
  lines = read_lines(path)
  filled = [line.strip() for line in lines if line.strip()]
  if filled and (filled[0].startswith("[") or filled[0] == "{"):
    raise InputError(
      f"{path} line 1: is no JSON object: give JSON lines, an object a line,"
      " such as jq -c '.[]' makes of an array"
    )
  rows = []
  kept = {
    name: Digits for name in ("parse_float", "parse_int", "parse_constant")
  }
  parsed = kept if as_written else {"parse_int": _integer}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    where = f"{path} line {number}"
    try:
      found = json.loads(line, object_pairs_hook=_object, **parsed)
    except _TwiceError as error:
      raise InputError(f"{where}: has {error} twice: remove one") from error
    except (ValueError, RecursionError):
      found = None
    if not isinstance(found, dict):
      raise InputError(f"{where}: is no JSON object: mend it")
    if text is not None and text not in found:
      raise InputError(
        f"{where}: has no text {text!r}, but {some(found)}: name the column of "
        "texts with --text_column"
      )
    if text is not None and type(found[text]) is not str:
      raise InputError(
        f"{where}: {text} is {shown(found[text])}, which is no text: write a"
        " string"
      )
    rows.append(Row(found, number, number))
  return rows


class _TwiceError(Exception):
  """A key that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    raise _TwiceError(shown(next(k for k in keys if keys.count(k) > 1)))
  return found


def _integer(digits: str) -> int | float:
  # Python refuses integers of thousands of digits, and float() large ones.
  return int(digits) if len(digits) < _DIGITS else float(digits)


def cell(path: Any, row: Row, name: str, known: Sequence[str] = ()) -> str:
  """A cell of JSON as a CSV file would have it.

  Args:
    path: of the file, for messages.
    row: of it.
    name: of the column.
    known: words that the column had before, which say how to spell a boolean.

  Raises:
    InputError: it is a list or an object.
  """
  value = row[name]
  if isinstance(value, bool):
    # Programs spell them in many ways.
    spelled = str(value)
    return next((w for w in known if w.lower() == spelled.lower()), spelled)
  if value is None:
    return ""
  if not isinstance(value, str):
    raise InputError(
      f"{place(path, row)}: {name} is {shown(value)}: write a number or a "
      "string"
    )
  return value


def shown(value: Any) -> str:
  """A value as a message shows it: short, on one line."""
  if isinstance(value, bool):
    return str(value).lower()
  return errors.shown(value, 40)


def some(row: Any) -> str:
  """The first names of a row, for a message."""
  names = [shown(name)[1:-1] for name in row][:12]
  return ", ".join(names) if names else "nothing"
