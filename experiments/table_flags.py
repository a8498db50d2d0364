"""Flags that say how a table of a user is read, in training and after it.

A script that takes them says `flags.adopt_module_key_flags(table_flags)`, so
that its `--help` lists them.
"""

from typing import Any

from absl import flags

import cli
from models.errors import InputError

_TEXT = flags.DEFINE_string(
  "text_column",
  None,
  "of jsonl (x if not given), csv (all columns that are no targets) and"
  " programs (source if not given; typed, sized, jaxpr, stablehlo)",
)
_COLUMNS = flags.DEFINE_list(
  "columns",
  [],
  "that are read beside the targets, in front of a --text_column; all of csv if"
  " neither is given",
)
_LEAVE_OUT = flags.DEFINE_list(
  "leave_out", [], "columns of csv that are not read, such as other results"
)
_DELIMITER = flags.DEFINE_string(
  "delimiter", None, "between cells of csv, such as ; or tab; found out if not"
)
_DECIMAL = cli.choice("decimal", None, "mark of decimals in csv", (".", ","))
_MISSING = flags.DEFINE_list(
  "missing", [], "spellings of a missing value beside NA, null, -, ? and such"
)


def _delimiter() -> str | None:
  given = {"tab": "\t", "\\t": "\t"}.get(_DELIMITER.value, _DELIMITER.value)
  if given is not None and len(given) != 1:
    raise InputError(f"--delimiter={given}: give one character, or tab")
  return given


def layout() -> dict[str, Any]:
  """The flags as fields of `DataOptions` and of `Layout`."""
  return {
    "text": _TEXT.value,
    "columns": tuple(_COLUMNS.value),
    "leave_out": tuple(_LEAVE_OUT.value),
    "delimiter": _delimiter(),
    "decimal": _DECIMAL.value,
    "missing": tuple(_MISSING.value),
  }
