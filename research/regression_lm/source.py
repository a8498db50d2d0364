"""What a training run asks of the place where its examples come from."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from models.numbers import NumberFormat
from research.regression_lm.api import RegressionLM
from research.regression_lm.token_batches import Dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Examples as a run takes them.

  Attributes:
    batch_at: step -> batch, a pure function.
    valid: held-out examples, or None.
    values: (N, O) training targets, for losses over a grid.
    scored: `batch_at` for a `Scale`, whose batches have "scores".
    has_range: whether `values` say what is plausible.
  """

  batch_at: Callable[[int], dict[str, np.ndarray]]
  valid: Dataset | None
  values: np.ndarray
  scored: Callable[[Any], Callable[[int], dict[str, np.ndarray]]]
  has_range: bool = True


class Source(Protocol):
  """What `training` asks of a source."""

  num_objectives: int

  def texts(self) -> Sequence[str]:
    """Training texts, to learn a tokenizer from."""

  def check(self, numbers: NumberFormat) -> None:
    """Raises InputError where a number format cannot hold the targets."""

  def prepare(self, lm: RegressionLM, rows: int, seed: int) -> Prepared:
    """Tokenizes for a model."""

  def summary(self) -> list[str]:
    """What the data holds, in lines."""

  def columns(self) -> list[dict[str, Any]] | None:
    """Columns that texts are written of, as `seen.Column.to_json`, if any."""

  def describe(self) -> dict[str, Any]:
    """JSON values that say which examples these are, without paths."""
