"""What the cells of a table mean: numbers, missing values, words.

Axis letters: N rows, F features.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# Spellings of a missing value, in small letters.
MISSING = ("", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "nil", "-",
           "--", "?", ".")  # fmt: skip
# A digit belongs to one part alone, or long cells would take forever.
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?inf(inity)?", re.IGNORECASE)
# A column of more different words is an identity, not a category.
_MOST_WORDS = 100
# Trees and nets compute in float32, whose largest number is 3.4e38.
_LARGEST = 1e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spelling:
  """How a file writes its cells.

  Attributes:
    decimal: mark in front of the decimals.
    missing: spellings of a missing value beside the usual ones.
  """

  decimal: str = "."
  missing: tuple[str, ...] = ()

  def is_missing(self, cell: Any) -> bool:
    """Whether a cell has no value."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
      return True
    if not isinstance(cell, str):
      return str(cell) in self.missing
    cell = cell.strip()
    return cell.lower() in MISSING or cell in self.missing

  def number(self, cell: Any) -> float | None:
    """The number that a cell is, perhaps infinite; None where it is none."""
    if isinstance(cell, bool):
      return None
    if isinstance(cell, int | float):
      try:
        return float(cell)
      except OverflowError:
        return math.copysign(math.inf, cell)
    if not isinstance(cell, str):
      return None
    cell = cell.strip()
    if self.decimal != ".":
      # A point is no decimal then: "2.000" beside "3,5" is two thousand.
      cell = cell.replace(".", " ").replace(self.decimal, ".")
    known = _NUMBER.fullmatch(cell) or _INFINITE.fullmatch(cell)
    return float(cell) if known else None


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """What a tabular peer is given.

  Attributes:
    names: F, such as "lr" or "optimizer = adam".
    values: (N, F) float64, NaN where a number is missing.
    left_out: columns that are no part of it, with the reason.
  """

  names: Sequence[str]
  values: np.ndarray
  left_out: Sequence[str] = ()


def features(
  rows: Sequence[Any], columns: Sequence[str], spelling: Spelling
) -> Features:
  """Numbers as they are, words one-hot; a column may have both.

  What is infinite, or beyond float32, becomes the largest number there; a row
  without a value has NaN as its number and none of the words.
  """
  names: list[str] = []
  values: list[np.ndarray] = []
  left_out = []
  for column in columns:
    cells = [row.get(column) for row in rows]
    gaps = np.array([spelling.is_missing(cell) for cell in cells])
    numbers = [spelling.number(cell) for cell in cells]
    found = np.array([np.nan if n is None else n for n in numbers])
    found[gaps] = np.nan
    if np.isfinite(found).any():
      names.append(column)
      values.append(np.clip(found, -_LARGEST, _LARGEST))
    words = [
      None if gap or number is not None else str(cell).strip()
      for cell, gap, number in zip(cells, gaps, numbers)
    ]
    known = sorted({word for word in words if word is not None})
    there = sum(word is not None for word in words)
    if known and (len(known) > _MOST_WORDS or len(known) > 0.9 * there > 2):
      left_out.append(f"{column} ({len(known)} different words)")
      continue
    for word in known:
      names.append(f"{column} = {word}")
      values.append(np.array([w == word for w in words], np.float64))
  table = np.array(values, np.float64).reshape(len(values), len(rows)).T
  return Features(names, table, left_out)
