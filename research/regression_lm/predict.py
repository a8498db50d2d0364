"""Predictions of a model for the rows of a file.

Rows that `rows_to_predict` read are predicted in batches: median and both ends
of the interval of every target, and the draws where they are asked for.
`written_rows` writes them.
"""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

from models.errors import InputError
from research.predictors.data_options import DataOptions
from research.predictors.new_rows import NewRows
from research.regression_lm import data_sets, sources
from research.regression_lm.api import RegressionLM
from research.regression_lm.rows_to_predict import targets_of

# Rows of validation that calibrate intervals, at most.
_CALIBRATED = 1000


def calibrate(
  lm: RegressionLM, path: str | pathlib.Path, samples: int, **how: Any
) -> None:
  """Widens intervals by the validation rows of the file of training.

  Args:
    lm: the model.
    path: the file that it was trained on.
    samples: draws a row, as many as predictions take.
    **how: level, temperature and so on, as predictions take them.

  Raises:
    InputError: the file is another, or no row was held out for validation.
  """
  described = lm.info.get("data") or {}
  if described.get("kind") in (None, data_sets.DENSITY):
    raise InputError("--calibrate_on: the model was trained on no table")
  source = sources.open_source(DataOptions.from_json(described), str(path))
  sources.check_same(source, described)
  if not source.held_out():
    raise InputError(
      "--calibrate_on: the model was trained without validation rows"
    )
  lm.calibrate(source.held_out()[:_CALIBRATED], samples, **how)


def batches(
  lm: RegressionLM, rows: NewRows, *, samples: int, batch: int, draws: bool,
  **how: Any,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
  """Predictions of rows, so many rows at a time.

  What a row is given depends on its place and the seed, not on the batch.

  Args:
    lm: the model.
    rows: of `rows_to_predict.read`.
    samples: draws a row.
    batch: rows of one step.
    draws: also give the draws.
    **how: as `RegressionLM.predict` takes it.

  Yields:
    For each row TARGET_median, TARGET_low, TARGET_high, which are None where no
    draw is a number, and TARGET_draws, a list.
  """
  names = targets_of(lm)
  for start in range(0, len(rows), batch):
    texts = rows.texts[start : start + batch]
    found = lm.predict(texts, samples, first=start, **how)
    columns = {"median": found.median, "low": found.low, "high": found.high}
    yield [
      {
        f"{name}_{what}": _number(values[row, place])
        for place, name in enumerate(names)
        for what, values in columns.items()
      }
      | {
        f"{name}_draws": [_number(v) for v in found.samples[row, :, place]]
        for place, name in enumerate(names)
        if draws
      }
      for row in range(len(texts))
    ]


def predicted_names(lm: RegressionLM, draws: bool) -> list[str]:
  """Names of the columns that `batches` makes, in the order of a file."""
  kinds = ("median", "low", "high", *(("draws",) if draws else ()))
  return [f"{name}_{kind}" for name in targets_of(lm) for kind in kinds]


def _number(value: float) -> float | None:
  return None if math.isnan(value) else float(value)
