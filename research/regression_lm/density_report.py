"""How well a model draws the densities of the synthetic task."""

import pathlib
from typing import Any

import numpy as np

from models.errors import InputError
from research.core import plots
from research.regression_lm import calibration, density_task
from research.regression_lm.api import RegressionLM

# Points of which an energy distance is taken: its cost is their square.
_POINTS = 1000


def evaluate(
  lm: RegressionLM, *, num_samples: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, tuple[np.ndarray, np.ndarray]]]:
  """Draws for each judged text, beside draws of the true density.

  Args:
    lm: the model, of two objectives.
    num_samples: draws a text.
    seed: of both.

  Returns:
    Rows with "text" and, for the model and for a second set of true points
    (what chance leaves of a perfect model), the energy distance to the true
    points and the mean CRPS of each coordinate; and text -> (true points,
    draws), each (num_samples, 2).

  Raises:
    InputError: the model has other objectives.
  """
  if lm.num_objectives != 2:
    raise InputError(
      f"the model predicts {lm.num_objectives} numbers, the task has 2"
    )
  rng = np.random.default_rng((seed, 29))
  texts = [density_task.text_of(*place) for place in density_task.JUDGED]
  draws = lm.sample(texts, num_samples, seed=seed)
  rows, clouds = [], {}
  for text, place, drawn in zip(texts, density_task.JUDGED, draws):
    truth = density_task.points(*place, num_samples, rng)
    again = density_task.points(*place, num_samples, rng)
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    for method, cloud in (("regression LM", drawn), ("true density", again)):
      row = {"text": text, "method": method, "draws": len(cloud)}
      row["energy_distance"] = density_task.energy_distance(
        cloud[:_POINTS], truth[:_POINTS]
      )
      for axis, name in enumerate(("crps_1", "crps_2")):
        # The same draws judge every true point.
        row[name] = _mean_crps(cloud[:, axis], truth[:_POINTS, axis])
      rows.append(row)
    clouds[text] = (truth, drawn)
  return rows, clouds


def _mean_crps(draws: np.ndarray, truth: np.ndarray) -> float:
  repeated = np.broadcast_to(
    draws[:_POINTS], (len(truth), len(draws[:_POINTS]))
  )
  return float(calibration.crps(repeated, truth).mean())


def plot(
  path: str | pathlib.Path,
  clouds: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
  """True points on the left, draws on the right, all texts in one plane."""
  figure, axes = plots.new_figure((8.0, 4.2), 1, 2)
  for axis, part, title in zip(
    axes[0], (0, 1), ("true density", "drawn by the model")
  ):
    for number, both in enumerate(clouds.values()):
      color = plots.BASELINES[number % len(plots.BASELINES)]
      axis.scatter(*both[part].T, s=1.2, alpha=0.4, linewidths=0, color=color)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlim(-2.5, 2.5)
    axis.set_ylim(-1.25, 1.25)
    axis.set_aspect("equal")
  figure.suptitle(
    "Two numbers given a text", x=0.02, ha="left", fontweight="bold"
  )
  plots.save(figure, path)
