"""Texts in records: a field of JSON lines, or a column of a Parquet file."""

import importlib.util
import pathlib
from collections.abc import Iterator

from models import input_files
from models.errors import InputError, shown

FIELD = "text"
JSON_LINES, PARQUET = ".jsonl", ".parquet"
# Rows that are unpacked at a time.
_ROWS = 1024


def holds(path: pathlib.Path) -> bool:
  """Whether a file holds records, by its name; JSON lines may be packed."""
  name = path.name.removesuffix(".gz").removesuffix(".xz")
  return name.endswith(JSON_LINES) or path.suffix == PARQUET


def check_readable(path: pathlib.Path) -> None:
  """Raises InputError where a package is missing that the file needs."""
  if path.suffix == PARQUET and importlib.util.find_spec("pyarrow") is None:
    raise InputError(
      f"{path}: Parquet files need the package pyarrow: run `pip install "
      "pyarrow`, or convert the file to .jsonl"
    )


def read(path: pathlib.Path, field: str = FIELD) -> list[str]:
  """The texts of all records; those that are null or blank are left out.

  Args:
    path: a .jsonl file, also .jsonl.gz or .jsonl.xz, or a .parquet file.
    field: that holds the text.

  Raises:
    InputError: the file cannot be read, or a record has no text there.
  """
  check_readable(path)
  records = _parquet if path.suffix == PARQUET else _json_lines
  found = []
  for where, value in records(path, field):
    if value is not None and not isinstance(value, str):
      raise InputError(
        f"{where}: {shown(field)} is {shown(value)}, no text: name another "
        "field as --text_field"
      )
    if value and not value.isspace():
      found.append(value)
  return found


def _json_lines(path: pathlib.Path, field: str) -> Iterator[tuple[str, object]]:
  # Strings may hold U+2028 and the like, at which `splitlines` would cut.
  lines = input_files.read_text(path).split("\n")
  for number, line in enumerate(lines, 1):
    if line and not line.isspace():
      where = f"{path} line {number}"
      record = input_files.parse_json(line, where, advice="mend the line")
      if field not in record:
        raise _no_field(where, field, record)
      yield where, record[field]


def _parquet(path: pathlib.Path, field: str) -> Iterator[tuple[str, object]]:
  from pyarrow import parquet

  path = input_files.regular(path)
  size, held, row = path.stat().st_size, 0, 0
  most = input_files.most_unpacked(size)
  with input_files.errors_at(path, wrong="is no readable Parquet file"):
    with parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      if field not in names:
        raise _no_field(str(path), field, names)
      for batch in file.iter_batches(_ROWS, columns=[field]):
        held += batch.nbytes
        if held > most:
          raise input_files.too_much(path, most, size)
        for value in batch.column(0).to_pylist():
          row += 1
          yield f"{path} row {row}", value


def _no_field(where: str, field: str, names) -> InputError:
  some = ", ".join(shown(name) for name in list(names)[:8])
  return InputError(
    f"{where}: has no field {shown(field)}, only {some or 'none'}: name "
    "another as --text_field"
  )
