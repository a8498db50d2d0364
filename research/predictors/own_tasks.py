"""A user's own tables as tasks: few numbers of a new one, many of others.

What was measured before may stand in other columns of the same rows, in files
of its own, or in rows of the same file, where a column says what a row is of (a
device, a data set). All become columns of `Facts`, with NaN where a row is of
another task.
"""

import dataclasses
import fnmatch
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from models.errors import InputError
from research.core import files
from research.predictors import cells, reading, tables
from research.predictors.reading import Row
from research.predictors.tables import Layout
from research.predictors.text_forms import Facts

FORM = "settings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
  """Where a user's numbers stand.

  Attributes:
    path: table of the new task.
    targets: its columns to predict.
    sources: columns that are learned first, with "*" for any letters: of the
      same rows, or of `source_paths`, which without them are of the targets.
    source_paths: tables of tasks that were measured before.
    task_column: of `path`, where its rows are of several tasks.
    new_task: what stands there in rows of the new one.
    layout: how the tables are read.
  """

  path: str | pathlib.Path
  targets: Sequence[str]
  sources: Sequence[str] = ()
  source_paths: Sequence[str | pathlib.Path] = ()
  task_column: str | None = None
  new_task: str | None = None
  layout: Layout = Layout()  # noqa: RUF009 (frozen)


@dataclasses.dataclass(frozen=True, eq=False)
class OwnTasks:
  """N rows of all tasks.

  Attributes:
    facts: their texts, features and numbers.
    targets: columns of the new task.
    sources: columns of the others.
    rows: N, as they stand in the files.
    is_new: (N,) bool, whether a row is of the new task.
  """

  facts: Facts
  targets: Sequence[str]
  sources: Sequence[str]
  rows: Sequence[Row]
  is_new: np.ndarray

  def digest(self) -> str:
    """Of all that is learned and asked."""
    return files.digest([self.facts.forms, self.facts.columns])[:16]

  def summary(self) -> list[str]:
    """What is known of each task, and what is told of a row."""
    found = []
    for kind, names in (("target", self.targets), ("source", self.sources)):
      for name in names:
        column = self.facts.columns[name]
        there = column[np.isfinite(column)]
        told = f"{there.min():g} to {there.max():g}" if len(there) else "none"
        found.append(f"{kind} {name}: {len(there)} numbers, {told}")
    first = int(np.flatnonzero(self.is_new)[0])
    text = " ; ".join(self.facts.forms[FORM][first])
    return [*found, f"text: {' '.join(text.split())[:160]}"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
  """Rows of one task, and its name; "" where no other has its columns."""

  path: object
  rows: Sequence[Row]
  name: str


def read(where: Where) -> OwnTasks:
  """Reads tables of a user.

  Args:
    where: the numbers stand.

  Raises:
    InputError: a file cannot be read, has not what is named, or a cell does
      not do.
  """
  new, others = _parts(where)
  known = _names(new.rows)
  for name in where.targets:
    if name not in known:
      raise InputError(
        f"{where.path}: has no target {name!r}, but {reading.some(known)}: mend"
        " --targets, or name what stands between the columns with --delimiter"
      )
  apart = bool(where.source_paths) or where.task_column is not None
  pool = (
    _names([row for part in others for row in part.rows]) if apart else known
  )
  sources = _matching(where, pool, where.targets if apart else ())
  settings = _settings(where, new, sources)
  columns: dict[str, np.ndarray] = {}
  rows = [row for part in (new, *others) for row in part.rows]
  starts = np.cumsum([0, *(len(part.rows) for part in (new, *others))])
  targets = _add(columns, new, 0, len(rows), where.targets, where.layout)
  learned = []
  for part, start in zip(others, starts[1:]):
    there = [name for name in sources if name in _names(part.rows)]
    if not there:
      raise InputError(
        f"{part.path}: has none of the columns {reading.some(sources)}: mend "
        "--sources"
      )
    learned += _add(columns, part, start, len(rows), there, where.layout)
  if not apart:
    learned = _add(columns, new, 0, len(rows), sources, where.layout)
  is_new = np.arange(len(rows)) < len(new.rows)
  return OwnTasks(
    _facts(where, rows, settings, columns), targets, learned, rows, is_new
  )


def _parts(where: Where) -> tuple[_Part, list[_Part]]:
  """The new task and the others."""
  if where.source_paths and where.task_column is not None:
    raise InputError("--source_paths and --task_column: give one of them")
  rows = _rows(where.path, where.layout)
  if where.task_column is None:
    others = []
    for number, path in enumerate(where.source_paths):
      name = pathlib.Path(path).name.partition(".")[0]
      if any(part.name == name for part in others):
        name = f"{name} {number}"
      others.append(_Part(path, _rows(path, where.layout), name))
    return _Part(where.path, rows, ""), others
  column = where.task_column
  if where.new_task is None:
    raise InputError("--task_column: give --new_task, the one to predict")
  by_task: dict[str, list[Row]] = {}
  for row in rows:
    if column not in row:
      raise InputError(
        f"{reading.place(where.path, row)}: has no column {column!r}, but "
        f"{reading.some(row)}: mend --task_column"
      )
    by_task.setdefault(row[column].strip(), []).append(row)
  if where.new_task not in by_task:
    raise InputError(
      f"{where.path}: {column} is nowhere {where.new_task!r}, but "
      f"{reading.some(by_task)}: mend --new_task"
    )
  new = by_task.pop(where.new_task)
  return _Part(where.path, new, where.new_task), [
    _Part(where.path, rows, name) for name, rows in by_task.items()
  ]


def _rows(path: str | pathlib.Path, layout: Layout) -> list[Row]:
  """Rows of CSV or JSON lines, with cells as CSV has them."""
  return [
    Row(
      {name: reading.cell(path, row, name) for name in row}, row.first, row.last
    )
    for row in reading.any_rows(path, layout.text, layout.delimiter)
  ]


def _names(rows: Sequence[Row]) -> list[str]:
  """All columns, in order."""
  return list(dict.fromkeys(name for row in rows for name in row))


def _matching(
  where: Where, known: Sequence[str], default: Sequence[str]
) -> list[str]:
  """Columns of the sources."""
  found: dict[str, None] = {}
  for pattern in where.sources or default:
    names = fnmatch.filter(known, pattern) if "*" in pattern else [pattern]
    if not set(names) & set(known):
      raise InputError(
        f"--sources={pattern}: there is no such column, but "
        f"{reading.some(known)}"
      )
    found |= dict.fromkeys(names)
  is_apart = bool(where.source_paths) or where.task_column is not None
  hidden = () if is_apart else where.targets
  return [name for name in found if name not in hidden]


def _settings(where: Where, new: _Part, sources: Sequence[str]) -> list[str]:
  """Columns that texts are written of: those of the new task alone."""
  layout, known = where.layout, _names(new.rows)
  hidden = {*where.targets, *sources, *layout.leave_out, layout.text}
  hidden |= {where.task_column}
  for name in layout.columns:
    if name not in known:
      raise InputError(
        f"{where.path}: has no column {name!r}, but {reading.some(known)}: "
        "mend --columns"
      )
  asked = layout.settings or (known if layout.text is None else ())
  found = [name for name in asked if name not in hidden]
  if not found and layout.text is None:
    raise InputError(
      f"{where.path}: has no column beside {reading.some(where.targets)} to "
      "predict from"
    )
  return found


def _add(columns, part: _Part, start, count, names, layout) -> list[str]:
  """Adds numbers of a part; the names of their columns."""
  tables.check_decimals(
    part.path, [row for row in part.rows if {*names} <= {*row}], names, layout
  )
  added = []
  for name in names:
    # Names become parts of file names.
    key = re.sub(r"[^\w.+]+", "_", f"{name} {part.name}".strip())
    while key in columns:
      key += "_"
    found = np.full(count, np.nan)
    for place, row in enumerate(part.rows):
      found[start + place] = tables.target_of(
        part.path, row, name, layout.spelling
      )
    columns[key] = found
    added.append(key)
  return added


def _facts(where, rows, settings, columns) -> Facts:
  layout = where.layout
  told = [name for name in settings if len({row.get(name) for row in rows}) > 1]
  spelling = layout.spelling

  def fields(row: Row) -> list[str]:
    found = [
      f"{name}: {row[name].strip()}"
      for name in told
      if not spelling.is_missing(row.get(name))
    ]
    if layout.text is not None:
      found.append(
        tables.checked_text(where.path, row, lambda r: r[layout.text])
      )
    return found or ["nothing"]

  features = cells.features(rows, told, spelling).values
  if not features.shape[1]:
    features = np.zeros((len(rows), 1))
  return Facts({FORM: [fields(row) for row in rows]}, {FORM: features}, columns)
