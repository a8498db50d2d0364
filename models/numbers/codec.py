"""Targets of several objectives as one row of tokens.

The decoder's vocabulary is two control tokens, then those of the number format.
Axis letters: B rows, O objectives, T = O * tokens of a number, S states of the
grammar, V tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from models.numbers.formats import NumberFormat
from models.numbers.grammar import Grammar

# Begins every row of the decoder's input; never a target.
START = 0
# Stands where an objective was not measured: read, never predicted or drawn.
MISSING = 1
_CONTROL = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetCodec:
  """Objectives, one after the other, in one number format.

  Attributes:
    format: of every number.
    num_objectives: O.
  """

  format: NumberFormat
  num_objectives: int = 1

  def __post_init__(self):
    """Checks the number of objectives; raises InputError."""
    if not isinstance(self.num_objectives, int) or self.num_objectives < 1:
      raise InputError(
        f"num_objectives={self.num_objectives!r} is not 1 or more"
      )

  @property
  def length(self) -> int:
    """T, tokens of a row."""
    return self.num_objectives * self.format.length

  @property
  def tokens(self) -> tuple[str, ...]:
    """Names of the V tokens, by id."""
    return ("<start>", "<missing>", *self.format.tokens)

  @functools.cached_property
  def grammar(self) -> Grammar:
    """The machine over the decoder's ids; control tokens are not allowed."""
    inner = self.format.grammar.next_state
    control = np.full((inner.shape[0], _CONTROL), -1, np.int32)
    return Grammar(np.concatenate([control, inner], axis=1))

  @functools.cached_property
  def zeros(self) -> np.ndarray:
    """All spellings of zero, (K, tokens of a number) of the decoder's ids."""
    return self.format.zeros + _CONTROL

  def objectives(self, y: Any) -> tuple[Any, ...]:
    """The O entries of a target; None where one is missing.

    Args:
      y: a number where O is 1, or a sequence of numbers and None; a sequence
        that is too short lacks its last objectives.

    Raises:
      InputError: there are more entries than objectives.
    """
    if isinstance(y, np.ndarray):
      y = list(y) if y.ndim else y[()]
    if isinstance(y, str) or not isinstance(y, Sequence):
      y = (y,)
    if len(y) > self.num_objectives:
      raise InputError(
        f"a target has {len(y)} objectives, the model has "
        f"{self.num_objectives}: leave out those it does not know"
      )
    return (*y, *[None] * (self.num_objectives - len(y)))

  def encode(self, targets: Sequence[Any]) -> np.ndarray:
    """Ids (B, T) int32 of targets, as `objectives` takes them.

    Raises:
      InputError: a target cannot be written; names its row.
    """
    width = self.format.length
    ids = np.full((len(targets), self.num_objectives, width), MISSING, np.int32)
    for row, y in enumerate(targets):
      try:
        for place, value in enumerate(self.objectives(y)):
          if value is not None:
            ids[row, place] = self.format.encode(value)
            ids[row, place] += _CONTROL
      except InputError as error:
        raise InputError(f"example {row}: {error}") from error
    return ids.reshape(len(targets), self.length)

  def values(self, ids: np.ndarray) -> np.ndarray:
    """Numbers (..., O) float64 of ids (..., T); missing or INVALID is NaN."""
    numbers, missing = self._split(ids)
    return np.where(missing, np.nan, self.format.values(numbers))

  def widths(self, ids: np.ndarray) -> np.ndarray:
    """Distances (..., O) to the next number; 1 where one is missing."""
    numbers, missing = self._split(ids)
    return np.where(missing, 1.0, self.format.widths(numbers))

  def _split(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(ids)
    shape = (*ids.shape[:-1], self.num_objectives, self.format.length)
    numbers = ids.reshape(shape) - _CONTROL
    missing = numbers[..., 0] < 0
    zero = np.asarray(self.format.encode(0))
    return np.where(missing[..., None], zero, numbers), missing
