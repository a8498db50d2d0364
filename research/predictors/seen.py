"""What training saw of the columns that its texts are written of.

A model keeps it, so that new rows are written in the same way, and so that a
cell unlike all of training is told: it is most often a mistake, such as another
mark of decimals.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from models.errors import InputError
from research.predictors.cells import Spelling
from research.predictors.tables import Table

# What a cell may be that training did not see: the first two are mistakes.
GAP, WORD_FOR_NUMBER, NEW_WORD, OUTSIDE = (
  "a missing value, which training never saw there",
  "no number, as all of training were",
  "a word that training never saw there",
  "outside of what training saw",
)
MISTAKES = (GAP, WORD_FOR_NUMBER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """Cells of one column in the training rows.

  Attributes:
    name: of the column.
    low: least number; None where no cell was one.
    high: largest number.
    words: those that are no numbers; None where they were too many to keep.
    gaps: whether values were missing.
  """

  name: str
  low: float | None = None
  high: float | None = None
  words: tuple[str, ...] | None = ()
  gaps: bool = False

  def to_json(self) -> dict[str, Any]:
    """For `from_json`."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Any) -> Self:
    """What `to_json` gave, also behind JSON.

    Raises:
      InputError: it is no such thing.
    """
    try:
      found = cls(**value)
      words = None if found.words is None else tuple(found.words)
      found = dataclasses.replace(found, words=words)
      is_text = isinstance(found.name, str)
      sound = is_text and (found.low is None or found.low <= found.high)
    except (TypeError, ValueError):
      sound = False
    if not sound:
      raise InputError(
        "config.json of the model does not describe its columns: get the model "
        "again"
      )
    return found

  def unlike(self, cell: Any, spelling: Spelling) -> str | None:
    """How a cell is unlike all of training; None where it is not."""
    if spelling.is_missing(cell):
      return None if self.gaps else GAP
    number = spelling.number(cell)
    if self.words is None:
      return None
    if number is None:
      if not self.words and not self.gaps:
        return WORD_FOR_NUMBER
      return None if str(cell).strip() in self.words else NEW_WORD
    if self.low is None:
      return NEW_WORD
    return None if self.low <= number <= self.high else OUTSIDE

  def told(self) -> str:
    """Numbers and words that it saw, for a message."""
    numbers = [] if self.low is None else [f"{self.low:g} to {self.high:g}"]
    words = list(self.words or ())
    more = [f"{len(words) - 8} more"] if len(words) > 8 else []
    return ", ".join(numbers + words[:8] + more)


def columns(table: Table, rows: np.ndarray) -> list[Column] | None:
  """What some rows of a table show of its columns.

  Args:
    table: the table.
    rows: indices of its training rows.

  Returns:
    None where its texts are not written of columns.
  """
  if not table.columns:
    return None
  features = table.features[rows]
  return [
    _column(name, table.feature_names, features) for name in table.columns
  ]


def _column(name: str, names: Sequence[str], features: np.ndarray) -> Column:
  start = f"{name} = "
  places = {n.removeprefix(start): i for i, n in enumerate(names)
            if n.startswith(start)}  # fmt: skip
  numbers = np.full(len(features), np.nan)
  if name in names:
    numbers = features[:, list(names).index(name)]
  there = np.isfinite(numbers)
  shown = {word: features[:, i] > 0 for word, i in places.items()}
  filled = there | np.any([np.zeros_like(there), *shown.values()], axis=0)
  # Peers are not given a column of too many words, of which nothing is known
  # here then.
  unknown = not places and name not in names
  return Column(
    name=name,
    low=float(numbers[there].min()) if there.any() else None,
    high=float(numbers[there].max()) if there.any() else None,
    words=None if unknown else tuple(w for w, at in shown.items() if at.any()),
    gaps=not filled.all(),
  )
