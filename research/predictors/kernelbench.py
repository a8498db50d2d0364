"""Programs and timings of KernelBench, and which of them are one problem.

Problems were renamed between versions (36_LTSMHn became 36_LSTMHn), and some
are the same program twice. What is learned of one must not be asked of the
other, so a fold holds out all of them.
"""

import ast
import pathlib
import re
from collections.abc import Mapping, Sequence

from models.errors import InputError
from research.predictors import reading
from research.predictors.reading import Row

# Same program under another number, in code that is written differently.
_RENAMED = {
  "level1/50_conv_standard_2D__square_input__square_kernel.py": (
    "level1/63_conv_standard_2D__square_input__square_kernel.py"
  ),
}
# Level 4 has one model of the hub at several sizes of its input.
_SIZES = re.compile(r"^(level4/)\d+_(.*)_bs\d+_seq\d+\.py$")
# That a timing must have, beside its numbers.
_COLUMNS = ("src", "level", "name", "hardware", "run", "mode")
_NUMBER = re.compile(r"^(level\d+/\d+)_")


def read(folder: pathlib.Path) -> tuple[dict[str, str], list[Row]]:
  """Programs by "src", and timings, whose "problem" is the one they are of.

  Args:
    folder: with kernelbench_sources.jsonl.gz and kernelbench_timings.csv.gz.

  Raises:
    InputError: a file is missing or does not do.
  """
  sources = folder / "kernelbench_sources.jsonl.gz"
  codes = {}
  for row in reading.jsonl_rows(sources, "code"):
    if not isinstance(row.get("src"), str):
      raise InputError(
        f"{reading.place(sources, row)}: has no text 'src': get the file again"
      )
    codes[row["src"]] = row["code"]
  path = folder / "kernelbench_timings.csv.gz"
  rows = reading.csv_rows(path)
  for column in _COLUMNS:
    if column not in rows[0]:
      raise InputError(f"{path}: has no column {column!r}: get the file again")
  for row in rows:
    if row["src"] not in codes:
      raise InputError(
        f"{reading.place(path, row)}: is of an unknown program "
        f"{reading.shown(row['src'])}"
      )
  problem = problems(rows, codes)
  for row in rows:
    row["problem"] = problem[name(row)]
  return codes, rows


def name(row: Mapping[str, str]) -> str:
  """The name of a timing's problem in its version."""
  return f"{row['level']}/{row['name']}"


def problems(
  rows: Sequence[Mapping[str, str]], codes: Mapping[str, str]
) -> dict[str, str]:
  """The problem of every name: the first of the names that are of one.

  Names are of one problem if they have the same level and number, since a
  problem keeps both when it is renamed; if a program of one is a program of
  the other, comments apart; if they differ in the size of the input alone;
  or if a table says so.

  Args:
    rows: timings with "level", "name" and "src".
    codes: src -> program.
  """
  parent: dict[str, str] = {}

  def root(key: str) -> str:
    while parent.setdefault(key, key) != key:
      key = parent[key]
    return key

  written = {src: f"code {_statements(code)}" for src, code in codes.items()}
  for row in rows:
    own = name(row)
    keys = [written[row["src"]], _RENAMED.get(own, own)]
    for pattern in (_SIZES, _NUMBER):
      if found := pattern.match(own):
        keys.append(" ".join(found.groups()))
        break
    for key in keys:
      parent[root(key)] = root(own)
  members: dict[str, list[str]] = {}
  for own in sorted({name(row) for row in rows}):
    members.setdefault(root(own), []).append(own)
  return {own: several[0] for several in members.values() for own in several}


def _statements(code: str) -> str:
  """A program without comments, docstrings and spaces."""
  try:
    tree = ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return code
  for node in ast.walk(tree):
    if isinstance(body := getattr(node, "body", None), list):
      node.body = [part for part in body if not _is_text(part)]
  return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
  return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
