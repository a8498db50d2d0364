"""The whole comparison: policy, baselines at its realised budgets, bounds.

Axis letters: W windows, E episodes, P budgets, M random schedules, T steps.

The policy runs first. Every baseline is then matched to the means that it
really spent on each axis. Schedules fixed in advance meet them exactly;
thresholds are calibrated on training text, run slightly below and above, and
mixed so that the net keep is the policy's.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from models import transformer
from research.sol import (
  actions,
  calibrate,
  controllers,
  cost,
  matched,
  random_trials,
  scoring,
)
from research.sol import damage as damage_lib
from research.sol import policy as policy_lib
from research.sol import static as static_lib
from research.sol import windows as windows_lib
from research.sol.artefact import Artefact
from research.sol.controllers import TwoLevels
from research.sol.learn import Method
from research.sol.rollout import Setup
from research.sol.scoring import BlockSeries, ScanSeries, Score
from research.sol.windows import Cover

type Series = ScanSeries | BlockSeries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to compare.

  Attributes:
    asked: net keep rates that the policy is asked for.
    thresholds: names of threshold baselines, of `controllers.SCORES`.
    regression: run the counterfactual regression.
    random_pool: M random schedules a budget; 0 for none, 1 for one trial,
      more for the best of whole-set trials, the per-window best and the
      per-token oracle.
    static: evaluate the static points of the literature.
    window_batch: windows whose prefix is alive at a time.
    max_rows: rollouts of one call.
    seed: of random schedules.
  """

  asked: Sequence[float]
  thresholds: Sequence[str] = tuple(controllers.SCORES)
  regression: bool = True
  random_pool: int = 32
  static: bool = True
  window_batch: int = 8
  max_rows: int = 4096
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """What is compared, and on what.

  Attributes:
    method: of the first artefact.
    lm: parameters of the frozen LLM.
    artefacts: name -> policy; the first is what all else is matched to.
    cover: the text.
    calibration: (W, S') windows of training text.
  """

  method: Method
  lm: transformer.Params
  artefacts: dict[str, Artefact]
  cover: Cover
  calibration: np.ndarray

  @property
  def ours(self) -> Artefact:
    """What all else is matched to."""
    return next(iter(self.artefacts.values()))

  @property
  def shape(self) -> tuple[int, int, int]:
    """(W, E, T) of the text."""
    return self.cover.weights.shape


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Scores of everything.

  Attributes:
    dense: the full action everywhere.
    policies: name -> P scores at the asked budgets; the first is the one
      that all else is matched to.
    baselines: name -> P scores, matched to the policy's.
    oracles: name -> P scores, matched; they look at true labels.
    static: name -> score.
    trials: P arrays (500,) of mean nll of random whole-set trials.
  """

  dense: Score
  policies: dict[str, list[Score]]
  baselines: dict[str, list[Score]]
  oracles: dict[str, list[Score]]
  static: dict[str, Score]
  trials: list[np.ndarray]

  @property
  def ours(self) -> list[Score]:
    """The P scores that all else is matched to."""
    return next(iter(self.policies.values()))


def goals_for(artefact: Artefact, asked: Sequence[float]) -> np.ndarray:
  """Goals (P, G) for asked net keep rates.

  With prices: the price whose calibrated spending is asked. With targets: the
  same share of every axis' range.
  """
  if artefact.prices.size:
    knobs = calibrate.knob_for(asked, artefact.prices, artefact.spent)
    return knobs[:, None].astype(np.float32)
  table = actions.preset(artefact.options.preset)
  table_low = np.asarray(table.target_low, np.float32)
  floor = table_low.mean()
  share = (np.asarray(asked, np.float32)[:, None] - floor) / (1 - floor)
  return table_low + np.clip(share, 0, 1) * (1 - table_low)


def compare(
  subject: Subject,
  plan: Plan,
  say: Callable[[str], None],
  progress: Callable[[str, int], Callable[[int], None]],
  keep: Callable[[Comparison], None] = lambda comparison: None,
) -> Comparison:
  """Runs the comparison.

  Args:
    subject: what to compare.
    plan: with what, and how.
    say: prints a line.
    progress: (label, total tokens) -> callback with tokens just scored.
    keep: called after every part with what there is, so that a run that is cut
      loses one part at most.
  """
  method, shape = subject.method, subject.shape
  scored = int(subject.cover.weights.sum())
  context = method.layout.context + method.layout.horizon / 2

  def score(
    label: str,
    series: Sequence[Series],
    setup: Setup = method.setup,
    keep_tokens: bool = False,
  ) -> dict[str, list[Score]]:
    total = scored * sum(one.points for one in series)
    return scoring.evaluate(
      setup,
      subject.lm,
      subject.cover,
      series,
      window_batch=plan.window_batch,
      max_rows=plan.max_rows,
      keep_tokens=keep_tokens,
      further_costs=cost.shares_of_dense(setup, context),
      progress=progress(label, total),
    )

  say("policy and dense")
  policies = score("policy", _policy_series(subject, plan))
  dense = policies.pop("dense")[0]
  found = Comparison(dense, policies, {}, {}, {}, [])
  keep(found)
  levels = [
    TwoLevels.around(method.setup.table, one.means) for one in found.ours
  ]
  say("calibrating baselines on training text")
  series = _matched_series(subject, plan, levels, found.ours)
  say("baselines")
  found.baselines.update(_matched(score("baselines", series), found.ours))
  keep(found)
  if plan.random_pool:
    say("random schedules")
    random_trials.play(score, levels, shape, plan, found)
    keep(found)
  if plan.static:
    say("static points of the literature")
    found.static.update(_static_points(subject, score))
    keep(found)
  return found


def _policy_series(subject: Subject, plan: Plan) -> list[Series]:
  """The dense model, and every policy at the asked budgets."""
  method = subject.method
  full = np.full((1, *subject.shape), method.setup.table.full_index, np.int16)
  series: list[Series] = [BlockSeries(name="dense", actions=full)]
  for name, one in subject.artefacts.items():
    series.append(
      ScanSeries(
        name=name,
        controller=policy_lib.controller(method.policy, greedy=True),
        params=(one.params, one.stats),
        goals=goals_for(one, plan.asked),
      )
    )
  return series


def _matched_series(
  subject: Subject,
  plan: Plan,
  levels: Sequence[TwoLevels],
  ours: Sequence[Score],
) -> list[Series]:
  """All baselines, calibrated on training text to what the policy spent."""
  method, lm = subject.method, subject.lm
  fixed = np.stack(
    [controllers.round_robin(one, subject.shape) for one in levels]
  )
  asked = [score.net_keep for score in ours]
  calibration = matched.Calibration(
    method=method,
    lm=lm,
    windows=subject.calibration,
    window_batch=plan.window_batch,
  )
  series: list[Series] = [
    BlockSeries(name="fixed", actions=fixed.astype(np.int16))
  ]
  series += [
    matched.threshold(calibration, name, levels) for name in plan.thresholds
  ]
  if plan.regression:
    series.append(matched.regression(calibration, subject.ours, asked))
  damage = np.asarray(subject.ours.stats.damage)
  series.append(
    static_lib.best_static(
      method.setup,
      lm,
      windows_lib.whole(subject.calibration, method.layout),
      damage_lib.mean_gains(damage),
      asked,
      subject.shape,
      window_batch=plan.window_batch,
      max_rows=plan.max_rows,
      divergence=method.reward == "divergence",
    )
  )
  return series


def _matched(
  result: dict[str, list[Score]], ours: Sequence[Score]
) -> dict[str, list[Score]]:
  """Baselines at the policy's net keep; schedules are there already."""
  out = {name: result.pop(name) for name in ("fixed", "best static")}
  for name, points in result.items():
    out[name] = [
      scoring.at_net_keep(points[2 * i], points[2 * i + 1], one.net_keep)
      for i, one in enumerate(ours)
    ]
  return out


def _static_points(subject: Subject, score) -> dict[str, Score]:
  """Single static actions that the literature reports."""
  setup = subject.method.setup
  kappa, rho, bits = zip(*static_lib.POINTS.values(), strict=True)
  table = dataclasses.replace(
    setup.table, name="static points", kappa=kappa, rho=rho, bits=bits
  )
  each = np.arange(table.size, dtype=np.int16)[:, None, None, None]
  played = np.broadcast_to(each, (table.size, *subject.shape))
  points = score(
    "static",
    [BlockSeries(name="static", actions=played)],
    setup=dataclasses.replace(setup, table=table),
  )["static"]
  return dict(zip(static_lib.POINTS, points, strict=True))
