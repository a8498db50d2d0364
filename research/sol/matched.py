"""Controllers without a network, calibrated to what the policy spent.

Axis letters: W windows, P budgets.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from models import transformer
from research.sol import calibrate, controllers, counterfactual
from research.sol.artefact import Artefact
from research.sol.controllers import TwoLevels
from research.sol.learn import Method
from research.sol.rollout import Controller, Rollout
from research.sol.scoring import ScanSeries

# Half width, in share of upper levels, of the two points around a budget.
BRACKET = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """Training text to play controllers on.

  Attributes:
    method: the method.
    lm: parameters of the frozen LLM.
    windows: (W, S') tokens.
    window_batch: windows alive at a time.
  """

  method: Method
  lm: transformer.Params
  windows: np.ndarray
  window_batch: int

  def play(self, controller: Controller, params: Any, goals: Any) -> Rollout:
    """Plays `goals`, P of them; see `calibrate.run_points`."""
    return calibrate.run_points(
      self.method.setup,
      self.lm,
      self.windows,
      self.method.layout.starts(),
      controller,
      params,
      goals,
      batch=self.window_batch,
    )


def threshold(
  calibration: Calibration, name: str, levels: Sequence[TwoLevels]
) -> ScanSeries:
  """A threshold baseline at two points around every budget.

  Args:
    calibration: the training text.
    name: of `controllers.SCORES`.
    levels: P pairs of levels, with the share of upper levels of each budget.
  """
  controller = controllers.threshold_controller()
  score = np.int32(list(controllers.SCORES).index(name))
  doubled, shares = calibrate.bracket(levels, BRACKET)

  def play(goal):
    played = calibration.play(controller, score, goal)
    return played.extras.reshape(len(doubled), -1, 3)

  everything = np.zeros((len(doubled), 3), np.float32)
  lookup = np.stack([one.lookup for one in doubled])
  first = play(controllers.ThresholdGoal(everything, lookup))
  goal = calibrate.thresholds_for(play, doubled, shares, first[0])
  return ScanSeries(name=name, controller=controller, params=score, goals=goal)


def regression(
  calibration: Calibration, artefact: Artefact, asked: Sequence[float]
) -> ScanSeries:
  """The counterfactual regression at two prices around every budget.

  Args:
    calibration: the training text.
    artefact: holds the coefficients.
    asked: P budgets, in the policy's unit.
  """
  policy = calibration.method.policy
  controller = counterfactual.controller(tuple(policy.costs.tolist()))
  params = (
    artefact.coefficients,
    artefact.scalar_stats,
    np.asarray(artefact.stats.damage),
  )
  costs = policy.spent
  prices = np.geomspace(1e-3, 100.0, 16).astype(np.float32)
  asked = np.asarray(asked)
  asked = np.stack([asked - BRACKET / 3, asked + BRACKET / 3], 1).reshape(-1)
  # The curve is first coarse over all prices, and then fine where the budget
  # lies.
  for _ in range(2):
    played = calibration.play(controller, params, prices[:, None])
    spent = costs[played.actions].mean((1, 2))
    knobs = calibrate.knob_for(asked, prices, spent)
    prices = np.geomspace(knobs.min() / 1.3, knobs.max() * 1.3, 12)
    prices = prices.astype(np.float32)
  return ScanSeries(
    name="counterfactual regression",
    controller=controller,
    params=params,
    goals=knobs[:, None].astype(np.float32),
  )
