"""The whole comparison: policy, baselines at its realised budgets, bounds.

Axis letters: W windows, E episodes, P budgets, M random schedules, T steps, A
actions.

The policy runs first. Every baseline is then matched to the means that it
really spent on each axis. Schedules fixed in advance meet them exactly;
thresholds are calibrated on training text, run slightly below and above, and
mixed so that the net keep is the policy's. The best static budgets are found
for net keep, FLOPs and bytes apart. At last the policy and the schedules play
the text once more without a refresh.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from models import module, transformer
from research.cost.controller import ControllerCost, controller_cost
from research.sol import (
  actions,
  calibrate,
  controllers,
  cost,
  matched,
  page_union,
  profile,
  random_trials,
  scoring,
)
from research.sol import policy as policy_lib
from research.sol import static as static_lib
from research.sol import windows as windows_lib
from research.sol.actions import ActionTable
from research.sol.artefact import Artefact
from research.sol.controllers import TwoLevels
from research.sol.cost import StepCosts
from research.sol.learn import Method
from research.sol.policy import PolicyConfig
from research.sol.rollout import Setup
from research.sol.scoring import BlockSeries, ScanSeries, Score
from research.sol.windows import Cover, Layout

_SHOWN = {"flops": "FLOPs"}
REGRESSION = "counterfactual regression"

type Series = ScanSeries | BlockSeries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to compare.

  Attributes:
    asked: net keep rates that the policy is asked for.
    thresholds: names of threshold baselines, of `controllers.SCORES`.
    regression: run the counterfactual regression.
    random_pool: M random schedules a budget; 0 for none, 1 for one trial,
      more for the best of whole-set trials and for what true labels give.
    static: evaluate static points after the literature.
    static_candidates: static actions that are tried on training text for a
      measure of cost.
    without_refresh: play the text without a refresh, too.
    window_batch: windows whose prefix is alive at a time.
    max_rows: rollouts of one call.
    seed: of random schedules.
  """

  asked: Sequence[float]
  thresholds: Sequence[str] = tuple(controllers.SCORES)
  regression: bool = True
  random_pool: int = 32
  static: bool = True
  static_candidates: int = 128
  without_refresh: bool = True
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
    calibration: (W, S') windows of training text, in the method's layout.
  """

  method: Method
  lm: transformer.Params
  artefacts: dict[str, Artefact]
  cover: Cover
  calibration: np.ndarray

  @property
  def unbroken(self) -> bool:
    """The text is played without a refresh."""
    return self.ours.options.refresh == "none"

  def policy(self, artefact: Artefact) -> PolicyConfig:
    """The shape of one of the policies."""
    config = self.method.setup.config
    options = artefact.options
    return options.method(config, None, artefact.action_costs.tolist()).policy

  @property
  def own(self) -> dict[str, ControllerCost]:
    """What policies and the regression cost themselves, by name."""
    found = {
      name: self.policy(one).own_cost(module.num_params(one.params))
      for name, one in self.artefacts.items()
    }
    found[REGRESSION] = controller_cost(
      self.ours.coefficients.size,
      products=1,
      table=self.method.setup.table.size,
    )
    return found

  @property
  def layout(self) -> Layout:
    """Of the text's windows."""
    episodes = self.cover.starts.shape[1]
    return dataclasses.replace(self.method.layout, episodes=episodes)

  @property
  def ours(self) -> Artefact:
    """What all else is matched to."""
    return next(iter(self.artefacts.values()))

  @property
  def shape(self) -> tuple[int, int, int]:
    """(W, E, T) of the text."""
    return self.cover.weights.shape


@dataclasses.dataclass
class Comparison:
  """Scores of everything; parts are added as they come.

  Attributes:
    dense: the full action everywhere.
    policies: name -> P scores at the asked budgets; the first is the one
      that all else is matched to.
    baselines: name -> P scores, matched to the policy's.
    oracles: name -> P scores, matched; they look at true labels.
    static: name -> score.
    trials: P arrays (500,) of mean nll of random whole-set trials.
    costs: FLOPs and bytes of steps at the text's mean context.
    own: what controllers cost themselves, by name; the others cost nothing.
    without_refresh: the dense model, the first policy and schedules once more,
      on the windows whose episodes follow each other, or None.
  """

  dense: Score
  policies: dict[str, list[Score]]
  baselines: dict[str, list[Score]]
  oracles: dict[str, list[Score]]
  static: dict[str, Score]
  trials: list[np.ndarray]
  costs: StepCosts
  own: dict[str, ControllerCost] = dataclasses.field(default_factory=dict)
  without_refresh: "Comparison | None" = None

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
  method = subject.method
  costs = _step_costs(subject, plan, say)

  def score(
    label: str,
    series: Sequence[Series],
    setup: Setup = method.setup,
    text: Cover = subject.cover,
    keep_tokens: bool = False,
  ) -> dict[str, list[Score]]:
    total = int(text.weights.sum()) * sum(one.points for one in series)
    # Rows hold the keys of all steps since the last refresh.
    longer = text.weights.shape[2] // setup.horizon
    return scoring.evaluate(
      setup,
      subject.lm,
      text,
      series,
      window_batch=plan.window_batch,
      max_rows=max(plan.max_rows // longer, 1),
      keep_tokens=keep_tokens,
      further_costs=costs.actions(setup.table),
      progress=progress(label, total),
    )

  say("policy and dense")
  policies = score("policy", _policies(subject, plan, subject.artefacts))
  dense = policies.pop("dense")[0]
  found = Comparison(dense, policies, {}, {}, {}, [], costs, subject.own)
  keep(found)
  levels = _levels(subject, found.ours)
  say("calibrating baselines on training text")
  series = _matched_series(subject, plan, levels, found.ours, costs)
  say("baselines")
  result = score("baselines", series)
  found.baselines.update(_matched(subject, costs, result, found.ours))
  keep(found)
  say("static budgets")
  tried = _static_search(subject, plan, costs, progress)
  static = _static_series(subject, costs, tried, found, subject.cover)
  every = _every_level(subject)
  points = [_static_points(subject, every)] if plan.static else []
  result = score("static", [*static, *points], setup=every)
  if plan.static:
    names = static_lib.POINTS
    found.static.update(zip(names, result.pop("points"), strict=True))
  found.baselines.update(result)
  keep(found)
  if plan.random_pool:
    say("random schedules")
    random_trials.play(score, levels, subject.shape, plan, found)
    keep(found)
  if plan.without_refresh and not subject.unbroken:
    say("without a refresh")
    found.without_refresh = _without_refresh(subject, plan, score, costs, tried)
    keep(found)
  return found


def _without_refresh(subject, plan, score, costs, tried) -> Comparison:
  """The dense model, the first policy and schedules on unbroken windows."""
  text, _ = windows_lib.unbroken(subject.cover, subject.layout)
  subject = dataclasses.replace(subject, cover=text)
  name, ours = next(iter(subject.artefacts.items()))
  policies = score("policy", _policies(subject, plan, {name: ours}), text=text)
  dense = policies.pop("dense")[0]
  found = Comparison(dense, policies, {}, {}, {}, [], costs, subject.own)
  levels = _levels(subject, found.ours)
  series = [_fixed(levels, subject.shape)]
  found.baselines.update(score("fixed", series, text=text))
  series = _static_series(subject, costs, tried, found, text)
  found.baselines.update(
    score("static", series, setup=_every_level(subject), text=text)
  )
  return found


def _step_costs(subject, plan, say) -> StepCosts:
  """Costs of a decode step, with the pages of groups measured."""
  every = _every_level(subject)
  say("measuring which pages the heads of a group share")
  union = page_union.measure(
    every,
    subject.lm,
    subject.calibration,
    first=subject.method.layout.context,
    batch=plan.window_batch,
  )
  context = subject.cover.mean_context
  found = None
  if subject.ours.options.profile:
    found = profile.read(pathlib.Path(subject.ours.options.profile))
  return StepCosts(
    setup=every, context=context, page_union=union, profile=found
  )


def _every_level(subject: Subject) -> Setup:
  """The set-up of static baselines."""
  setup = subject.method.setup
  table = static_lib.every_level(setup.table)
  return dataclasses.replace(setup, table=table)


def _levels(subject, ours) -> list[TwoLevels]:
  table = subject.method.setup.table
  return [TwoLevels.around(table, score.means) for score in ours]


def _policies(
  subject: Subject, plan: Plan, artefacts: Mapping[str, Artefact]
) -> list[Series]:
  """The dense model, and policies at the asked budgets."""
  method = subject.method
  full = np.full((1, *subject.shape), method.setup.table.full_index, np.int16)
  series: list[Series] = [BlockSeries(name="dense", actions=full)]
  for name, one in artefacts.items():
    series.append(
      ScanSeries(
        name=name,
        controller=policy_lib.controller(subject.policy(one), greedy=True),
        params=(one.params, one.stats),
        goals=goals_for(one, plan.asked),
      )
    )
  return series


def _fixed(levels: Sequence[TwoLevels], shape: tuple[int, ...]) -> BlockSeries:
  """Schedules that alternate evenly, with the policy's mean on every axis."""
  played = [controllers.round_robin(one, shape) for one in levels]
  return BlockSeries(name="fixed", actions=np.stack(played).astype(np.int16))


def _matched_series(
  subject: Subject,
  plan: Plan,
  levels: Sequence[TwoLevels],
  ours: Sequence[Score],
  costs: StepCosts,
) -> list[Series]:
  """Baselines from the policy's actions, at what the policy spent."""
  calibration = matched.Calibration(
    method=subject.method,
    lm=subject.lm,
    windows=subject.calibration,
    window_batch=plan.window_batch,
  )
  series: list[Series] = [_fixed(levels, subject.shape)]
  series += [
    matched.threshold(calibration, name, levels) for name in plan.thresholds
  ]
  if plan.regression:
    unit = subject.ours.options.budget_unit
    asked = [_spent(subject, costs, unit, score) for score in ours]
    series.append(matched.regression(calibration, subject.ours, asked))
  return series


def _spent(
  subject: Subject, costs: StepCosts, unit: str, score: Score
) -> float:
  """What the regression may spend on actions where the first policy spends so.

  In the budget's unit: the policy's own cost is added and the regression's
  taken off. Net keep knows neither.
  """
  if unit == "net_keep":
    return score.net_keep
  at = costs.units.index(unit)
  own = subject.own
  more = costs.controller(own[next(iter(subject.artefacts))])
  return float((score.further + more - costs.controller(own[REGRESSION]))[at])


def _matched(
  subject: Subject,
  costs: StepCosts,
  result: dict[str, list[Score]],
  ours: Sequence[Score],
) -> dict[str, list[Score]]:
  """Baselines at what the policy spent; fixed schedules are there already.

  The regression has a price, as the policy, and is matched in the budget's
  unit; thresholds are matched in net keep.
  """
  out = {"fixed": result.pop("fixed")}
  for name, points in result.items():
    unit = "net_keep"
    if name == REGRESSION:
      unit = subject.ours.options.budget_unit
    if unit == "net_keep":
      of = lambda score: score.net_keep
    else:
      at = costs.units.index(unit)
      of = lambda score, at=at: float(score.further[at])
    out[name] = [
      scoring.at_cost(
        points[2 * i],
        points[2 * i + 1],
        _spent(subject, costs, unit, one),
        of,
      )
      for i, one in enumerate(ours)
    ]
  return out


def _measures(costs: StepCosts, table: ActionTable) -> dict[str, np.ndarray]:
  """What static budgets are chosen by: name -> costs (A,)."""
  counted = dict(zip(costs.units, costs.actions(table).T, strict=True))
  return {"best static": cost.net_keep(table)} | {
    f"best static by {_SHOWN.get(unit, unit)}": each
    for unit, each in counted.items()
  }


def _static_search(subject, plan, costs, progress) -> static_lib.Tried:
  """Scores static actions on training text."""
  method, every = subject.method, _every_level(subject)
  text = windows_lib.whole(subject.calibration, method.layout)
  max_rows = plan.max_rows
  if subject.unbroken:
    # Static budgets are chosen as they are played: without a refresh.
    text, _ = windows_lib.unbroken(text, method.layout)
    every = dataclasses.replace(every, horizon=text.weights.shape[2])
    # Rows are as many times longer.
    longer = every.horizon // method.setup.horizon
    max_rows = max(max_rows // longer, 1)
  return static_lib.search(
    every,
    subject.lm,
    text,
    list(_measures(costs, every.table).values()),
    window_batch=plan.window_batch,
    max_rows=max_rows,
    divergence=method.reward == "divergence",
    most=plan.static_candidates,
    progress=progress,
  )


def _static_series(subject, costs, tried, found, text) -> list[Series]:
  """The best static schedules at the policy's net keep, FLOPs and bytes."""
  table = static_lib.every_level(subject.method.setup.table)
  own = costs.controller(subject.own[next(iter(subject.artefacts))])
  asked = np.array([[one.net_keep, *(one.further + own)] for one in found.ours])
  return [
    BlockSeries(
      name=name, actions=tried.schedules(each, wanted, text.weights.shape)
    )
    for (name, each), wanted in zip(
      _measures(costs, table).items(), asked.T, strict=True
    )
  ]


def _static_points(subject: Subject, setup: Setup) -> BlockSeries:
  """Single static actions after the literature."""
  table = setup.table
  place = {
    point: i
    for i, point in enumerate(
      zip(table.kappa, table.rho, table.bits, strict=True)
    )
  }
  each = np.array([place[point] for point in static_lib.POINTS.values()])
  each = each.astype(np.int16)[:, None, None, None]
  return BlockSeries(
    name="points", actions=np.broadcast_to(each, (len(each), *subject.shape))
  )
