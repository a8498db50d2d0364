"""How well a model draws the densities of the synthetic task."""

import pathlib
from typing import Any

import numpy as np

from models.errors import InputError
from research.core import plots
from research.predictors import calibration
from research.regression_lm.api import RegressionLM
from research.regression_lm.density import task as density_task

# Points of which an energy distance is taken: its cost is their square.
_POINTS = 1000
# True points whose second number is predicted given the first, and the draws
# of each; for the truth they are the nearest of so many points.
_GIVEN, _DRAWS, _POOL = 100, 64, 100_000


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
    points, the mean CRPS of each coordinate, and of the second given the first
    (margins alone say nothing about the figure); and text -> (true points,
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
  given = [
    density_task.points(*place, _GIVEN, rng) for place in density_task.JUDGED
  ]
  second = lm.sample(
    [text for text in texts for _ in range(_GIVEN)],
    _DRAWS,
    seed=seed,
    given=[[x, None] for cloud in given for x in cloud[:, 0].tolist()],
  )[..., 1].reshape(len(texts), _GIVEN, _DRAWS)
  for number, (text, place) in enumerate(zip(texts, density_task.JUDGED)):
    truth = density_task.points(*place, num_samples, rng)
    again = density_task.points(*place, num_samples, rng)
    drawn = draws[number][np.isfinite(draws[number]).all(axis=1)]
    nearest = _nearest(density_task.points(*place, _POOL, rng), given[number])
    for method, cloud, conditional in (
      ("regression LM", drawn, second[number]),
      ("true density", again, nearest),
    ):
      row = {"text": text, "method": method, "draws": len(cloud)}
      row["energy_distance"] = density_task.energy_distance(
        cloud[:_POINTS], truth[:_POINTS]
      )
      for axis, name in enumerate(("crps_1", "crps_2")):
        # The same draws judge every true point.
        row[name] = _mean_crps(cloud[:, axis], truth[:_POINTS, axis])
      scores = calibration.crps(conditional, given[number][:, 1])
      row["crps_2_given_1"] = float(np.nanmean(scores))
      rows.append(row)
    clouds[text] = (truth, drawn)
  return rows, clouds


def _nearest(pool: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Second numbers of the points of `pool` nearest to each by the first."""
  pool = pool[np.argsort(pool[:, 0])]
  at = np.searchsorted(pool[:, 0], points[:, 0])
  first = np.clip(at - _DRAWS // 2, 0, len(pool) - _DRAWS)
  return pool[first[:, None] + np.arange(_DRAWS)[None], 1]


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
  figure, axes = plots.new_figure((8.0, 2.8), 1, 2)
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
  plots.save(figure, path)
