"""Fills the tables of README.md from result files.

  python experiments/readme_tables.py          # writes
  python experiments/readme_tables.py --check  # exits with 1 where out of date

A table stands between the lines `<!-- table: FILE -->` and `<!-- end -->`,
FILE relative to the README. Its form follows from the keys of the rows.
"""

import json
import pathlib
import re
import sys

from absl import flags

import cli
from models.errors import InputError
from research.results import language_model as language_models
from research.results import ops as table
from research.results import program_metrics as programs
from research.results import regression_lm as regression_lms
from research.results import sol

_README = flags.DEFINE_string("readme", "README.md", "the file to fill")
_CHECK = flags.DEFINE_bool("check", False, "write nothing, only compare")

_BLOCK = re.compile(
  r"(<!-- table: (\S+) -->\n)((?:(?!<!-- ).)*)(<!-- end -->)", re.DOTALL
)


def _table(path: pathlib.Path, name: str) -> str:
  """The Markdown for one result file."""
  if not path.exists():
    return "not measured yet\n"
  try:
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = result["rows"]
    kinds = {
      **language_models.KINDS,
      "peer_ms": table.markdown,
      **sol.KINDS,
      **regression_lms.KINDS,
      **programs.KINDS,
    }
    body = next(kinds[key] for key in kinds if key in rows[0])(rows)
    where = f"{result['device']}, {result['seconds']:,.0f} s"
    commit = f"commit {result['commit'] or 'unknown'}"
    return f"{body}\n[{name}]({name}): {where}, {commit}\n"
  except (ValueError, KeyError, IndexError, StopIteration, TypeError) as error:
    raise InputError(
      f"{path}: is no result of an evaluation or a benchmark "
      f"({type(error).__name__}: {error}): write it anew"
    ) from error


def main(_) -> None:
  """Fills or compares; see the module's docstring."""
  path = pathlib.Path(_README.value)
  if not path.is_file():
    raise InputError(f"{path}: no such file: give --readme")
  old = path.read_text(encoding="utf-8")
  if old.count("<!-- table: ") != len(_BLOCK.findall(old)):
    raise InputError(f"{path}: a `<!-- table: -->` has no `<!-- end -->`")
  new = _BLOCK.sub(
    lambda m: f"{m[1]}{_table(path.parent / m[2], m[2])}{m[4]}", old
  )
  if _CHECK.value and new != old:
    sys.exit(f"{path} is out of date: run experiments/readme_tables.py")
  if not _CHECK.value:
    path.write_text(new, encoding="utf-8")
  print(f"{path}: {'changed' if new != old else 'up to date'}")


if __name__ == "__main__":
  cli.run(main)
