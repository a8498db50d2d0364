"""The synthetic task as a source of examples for a training run."""

import dataclasses
from typing import Any

import numpy as np

from models.errors import InputError
from models.numbers import NumberFormat
from research.regression_lm import token_batches
from research.regression_lm.api import RegressionLM
from research.regression_lm.data_sets import DENSITY
from research.regression_lm.density import task as density_task
from research.regression_lm.source import Prepared


@dataclasses.dataclass(frozen=True)
class DensitySource:
  """The synthetic task of `density_task`: examples without end."""

  num_objectives = 2

  def texts(self) -> list[str]:
    """Some texts."""
    return density_task.drawn_at(0, 256, 0)[0]

  def check(self, numbers: NumberFormat) -> None:
    """All points lie in (-6, 6)."""

  def prepare(self, lm: RegressionLM, rows: int, seed: int) -> Prepared:
    """Examples are made as they are asked for; validation has other ones.

    Raises:
      InputError: `rows` cannot be cut into texts with their points.
    """
    if rows % density_task.POINTS:
      raise InputError(
        f"--batch={rows} is no multiple of {density_task.POINTS}, the points "
        "of a text: change it"
      )
    texts = rows // density_task.POINTS
    codec, seen = lm.model.codec, {}

    def written(points: np.ndarray) -> np.ndarray:
      """Targets (rows, T) of points to four decimals, most of them known."""
      values = np.round(points, 4).ravel().tolist()
      new = [value for value in set(values) if value not in seen]
      ids = codec.encode([[value] for value in new])
      seen.update(zip(new, ids[:, : codec.format.length]))
      return np.stack([seen[value] for value in values]).reshape(rows, -1)

    def batch_at(step):
      names, clouds = density_task.drawn_at(step, texts, seed)
      read = token_batches.read_texts(lm.tokenizer, names, lm.max_length)
      tokens, lengths = read.rows(np.arange(texts))
      targets = written(clouds)
      return {
        "tokens": tokens,
        "lengths": lengths,
        "targets": targets.reshape(texts, density_task.POINTS, -1),
      }

    def scored(scale):
      raise InputError(
        "--data=density has many numbers a text, whose expected value says "
        "little: leave --expected_value and --ranking at 0"
      )

    held_out = density_task.examples_at(0, 64, seed + 1)
    values = np.array([example.y for example in held_out])
    return Prepared(
      batch_at, lm.dataset(held_out), values, scored, has_range=False
    )

  def summary(self) -> list[str]:
    """Its name."""
    return ["synthetic densities of two numbers"]

  def columns(self) -> None:
    """Its texts are written of none."""

  def describe(self) -> dict[str, Any]:
    """Its name."""
    return {"kind": DENSITY}
