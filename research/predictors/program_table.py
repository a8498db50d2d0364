"""Tables of JAX programs and what they cost, for predictors."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.predictors import program_text, reading, size_features, tables
from research.predictors.tables import Table

# Texts of a table: columns, and what is made of one. Those that are Python.
# Then columns that the compiler counts, and second measurements of others.
SIZED = "sized"
VIEWS = ("source", "typed", SIZED, "jaxpr", "stablehlo")
_PYTHON = {"source": "source", "typed": "typed", SIZED: "typed"}
_COSTS = ("flops", "bytes_accessed", "transcendentals", "peak_bytes")
_AGAIN = {"latency_us": "latency_again_us"}


def programs(
  path: pathlib.Path, targets: Sequence[str], view: str = VIEWS[0]
) -> Table:
  """JAX programs and what they cost, by `experiments/make_program_metrics.py`.

  The groups are the programs' operators.

  Args:
    path: of the JSONL file; .gz and .xz are unpacked.
    targets: such as flops, bytes_accessed, peak_bytes, latency_us.
    view: one of `VIEWS`; "sized" is `program_text.sized` of "typed". The
      texts of the first three have other forms that mean the same.

  Raises:
    InputError: the file is no such file, or the view is unknown.
  """
  if view not in VIEWS:
    raise InputError(f"--text_column={view}: take one of {', '.join(VIEWS)}")
  column = _PYTHON.get(view, view)
  shown = program_text.sized if view == SIZED else str
  rows = reading.jsonl_rows(path, column)
  first = rows[0] if rows else {}
  splits = [name for name in first if name.startswith("split_")]
  wanted = [_AGAIN[target] for target in targets if target in _AGAIN]
  for number, row in enumerate(rows, 1):
    missing = {*_COSTS, *targets, *wanted, *splits, "operators"} - row.keys()
    if missing:
      raise InputError(f"{path} line {number}: has no {sorted(missing)[0]!r}")
    for name in (*_COSTS, *wanted):
      if not _is_number(row[name]):
        raise InputError(
          f"{path} line {number}: {name} is {reading.shown(row[name])}, which "
          "is no number: mend it"
        )
    for name in ("operators", *splits):
      if not isinstance(row[name], str):
        raise InputError(
          f"{path} line {number}: {name} is {reading.shown(row[name])}, which "
          "is no text: mend it"
        )
    # A compiler says -1 where it cannot count.
    row.update({name: None for name in _COSTS if (row[name] or 0) < 0})
    try:
      row["text"] = shown(row[column])
    except InputError as error:
      raise InputError(f"{path} line {number}: {error}") from error
  found = tables.make_table(
    path, rows, targets, lambda row: row["text"], lambda row: row["operators"]
  )
  if len(found) != len(rows):
    raise InputError(f"{path}: a program has none of the targets: remove it")
  numbers = lambda name: np.array([row[name] for row in rows], np.float64)
  codes = [row[column] for row in rows]

  def other_texts(row: int, count: int, seed: int) -> list[str]:
    forms = program_text.other_forms(codes[row], count, seed)
    return [shown(form) for form in forms]

  return dataclasses.replace(
    found,
    parts={
      name.removeprefix("split_"): [row[name] for row in rows]
      for name in splits
    },
    costs={name: np.nan_to_num(numbers(name)) for name in _COSTS},
    sizes=_sizes(rows),
    again={
      target: numbers(other)
      for target, other in _AGAIN.items()
      if target in targets
    },
    other_texts=other_texts if view in _PYTHON else None,
  )


def _is_number(value: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, int | float | None):
    return False
  return value is None or abs(value) < math.inf


def _sizes(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Sizes that stand in the programs; none where a text is no program."""
  try:
    return size_features.of_texts([str(row.get("typed", "")) for row in rows])
  except InputError:
    return {}
