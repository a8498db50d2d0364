"""The whole comparison: policy, baselines at its realised budgets, bounds.

Axis letters: W windows, E episodes, P budgets, M random schedules, T steps.

The policy runs first. Every baseline is then matched to the means that it
really spent on each axis. Schedules fixed in advance meet them exactly;
thresholds are calibrated on training text, run slightly below and above, and
mixed so that the net keep is the policy's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models import transformer
from research.sol import actions, calibrate, controllers, cost, counterfactual
from research.sol import damage as damage_lib
from research.sol import policy as policy_lib
from research.sol import scoring as evaluate_lib
from research.sol import static as static_lib
from research.sol import windows as windows_lib
from research.sol.artefact import Artefact
from research.sol.controllers import TwoLevels
from research.sol.learn import Method
from research.sol.scoring import BlockSeries, ScanSeries, Score
from research.sol.windows import Cover

Tree = Any

# Half width, in share of upper levels, of the two points around a budget.
_BRACKET = 0.01


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
  method: Method,
  lm: transformer.Params,
  artefacts: dict[str, Artefact],
  cover: Cover,
  calibration: np.ndarray,
  plan: Plan,
  say: Callable[[str], None],
  progress: Callable[[str, int], Callable[[int], None]],
  keep: Callable[[Comparison], None] = lambda comparison: None,
) -> Comparison:
  """Runs the comparison.

  Args:
    method: of the first artefact.
    lm: parameters of the frozen LLM.
    artefacts: name -> policy; the first is what all else is matched to.
    cover: the text.
    calibration: (W, S') windows of training text.
    plan: what to compare.
    say: prints a line.
    progress: (label, total tokens) -> callback with tokens just scored.
    keep: called after every part with what there is, so that a run that is cut
      loses one part at most.
  """
  setup = method.setup
  scored = int(cover.weights.sum())

  def run(label, series, own=False, setup=setup):
    total = scored * sum(one.points for one in series)
    return evaluate_lib.evaluate(
      setup,
      lm,
      cover,
      series,
      window_batch=plan.window_batch,
      max_rows=plan.max_rows,
      keep_tokens=own,
      further_costs=cost.shares_of_dense(
        setup, method.layout.context + method.layout.horizon / 2
      ),
      progress=progress(label, total),
    )

  shape = (cover.num_windows, *cover.weights.shape[1:])
  full = np.full((1, *shape), setup.table.full_index, np.int16)
  first = [BlockSeries(name="dense", actions=full)]
  for name, one in artefacts.items():
    first.append(
      ScanSeries(
        name=name,
        controller=policy_lib.controller(method.policy, greedy=True),
        params=(one.params, one.stats),
        goals=goals_for(one, plan.asked),
      )
    )
  say("policy and dense")
  result = run("policy", first)
  dense = result.pop("dense")[0]
  policies = result
  found = Comparison(dense, policies, {}, {}, {}, [])
  keep(found)
  ours = next(iter(policies.values()))
  levels = [TwoLevels.around(setup.table, score.means) for score in ours]

  fixed = np.stack([controllers.round_robin(one, shape) for one in levels])
  series = [BlockSeries(name="fixed", actions=fixed.astype(np.int16))]
  say("calibrating baselines on training text")
  first_artefact = next(iter(artefacts.values()))
  asked = [score.net_keep for score in ours]
  series += [
    _threshold_series(method, lm, name, levels, calibration, plan)
    for name in plan.thresholds
  ]
  if plan.regression:
    series.append(
      _regression_series(method, lm, first_artefact, asked, calibration, plan)
    )
  series.append(
    static_lib.best_static(
      setup,
      lm,
      windows_lib.whole(calibration, method.layout),
      damage_lib.mean_gains(np.asarray(first_artefact.stats.damage)),
      asked,
      shape,
      window_batch=plan.window_batch,
      max_rows=plan.max_rows,
      divergence=method.reward == "divergence",
    )
  )
  say("baselines")
  result = run("baselines", series)
  for name in ("fixed", "best static"):
    found.baselines[name] = result.pop(name)
  for name, points in result.items():
    found.baselines[name] = [
      evaluate_lib.at_net_keep(points[2 * i], points[2 * i + 1], one.net_keep)
      for i, one in enumerate(ours)
    ]
  keep(found)
  if plan.random_pool:
    say("random schedules")
    _random(run, levels, shape, plan, found)
    keep(found)
  if plan.static:
    say("static points of the literature")
    kappa, rho, bits = zip(*static_lib.POINTS.values(), strict=True)
    table = dataclasses.replace(
      setup.table, name="static points", kappa=kappa, rho=rho, bits=bits
    )
    each = np.arange(table.size, dtype=np.int16)[:, None, None, None]
    actions = np.broadcast_to(each, (table.size, *shape))
    points = run(
      "static",
      [BlockSeries(name="static", actions=actions)],
      setup=dataclasses.replace(setup, table=table),
    )["static"]
    found.static.update(zip(static_lib.POINTS, points, strict=True))
    keep(found)
  return found


def _threshold_series(
  method, lm, name, levels, calibration, plan
) -> ScanSeries:
  """A threshold baseline at two points around every budget."""
  controller = controllers.threshold_controller(controllers.SCORES[name])
  doubled, shares = calibrate.bracket(levels, _BRACKET)

  def play(goal):
    played = calibrate.run_points(
      method.setup,
      lm,
      calibration,
      method.layout.starts(),
      controller,
      None,
      goal,
      batch=plan.window_batch,
    )
    return played.extras.reshape(len(doubled), -1, 3)

  everything = np.zeros((len(doubled), 3), np.float32)
  lookup = np.stack([one.lookup for one in doubled])
  first = play(controllers.ThresholdGoal(everything, lookup))
  goal = calibrate.thresholds_for(play, doubled, shares, first[0])
  return ScanSeries(name=name, controller=controller, params=None, goals=goal)


def _regression_series(
  method, lm, artefact, asked, calibration, plan
) -> ScanSeries:
  """The counterfactual regression at two prices around every budget."""
  table = method.setup.table
  controller = counterfactual.controller(table)
  params = (
    artefact.coefficients,
    artefact.scalar_stats,
    np.asarray(artefact.stats.damage),
  )
  costs = cost.net_keep(table)
  prices = np.geomspace(1e-3, 100.0, 16).astype(np.float32)
  asked = np.asarray(asked)
  asked = np.stack([asked - _BRACKET / 3, asked + _BRACKET / 3], 1).reshape(-1)
  # The curve is first coarse over all prices, and then fine where the budget
  # lies.
  for _ in range(2):
    played = calibrate.run_points(
      method.setup,
      lm,
      calibration,
      method.layout.starts(),
      controller,
      params,
      prices[:, None],
      batch=plan.window_batch,
    )
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


def _random(run, levels, shape, plan, found) -> None:
  """Random schedules: one, the best whole-set trials, and two oracles."""
  pool_size = plan.random_pool
  one, best_30, best_500, per_window = [], [], [], []
  oracle_actions = []
  for budget, level in enumerate(levels):
    pool = np.stack(
      [
        controllers.random_schedule(
          level, shape, seed=(plan.seed * 1000 + budget) * 1000 + trial
        )
        for trial in range(pool_size)
      ]
    ).astype(np.int16)
    name = f"random {budget + 1}/{len(levels)}"
    scores = run(name, [BlockSeries(name=name, actions=pool)], own=True)[name]
    one.append(scores[0])
    if pool_size < 2:
      continue
    nll = np.stack([score.nll for score in scores])
    spent = np.stack([score.spent for score in scores])
    generator = np.random.default_rng((plan.seed, budget))
    draws = generator.integers(0, pool_size, size=(500, *nll.shape[1:]))
    # Trial t plays schedule draws[t] of the pool in each episode.
    totals = np.array(
      [np.take_along_axis(nll, d[None], 0).sum() for d in draws]
    )
    found.trials.append(totals / scores[0].tokens.sum())
    for count, out in ((30, best_30), (500, best_500)):
      best = draws[totals[:count].argmin()]
      out.append(_chosen(scores[0], nll, spent, best))
    per_window.append(_chosen(scores[0], nll, spent, nll.argmin(0)))
    own = np.stack([score.own for score in scores])
    oracle_actions.append(_oracle_schedule(level, pool, own))
  found.baselines["random"] = one
  if pool_size < 2:
    return
  found.baselines["random, best of 30"] = best_30
  found.baselines["random, best of 500"] = best_500
  found.oracles[f"per-window best of {pool_size}"] = per_window
  found.oracles["per-token oracle"] = run(
    "oracle",
    [BlockSeries(name="oracle", actions=np.stack(oracle_actions))],
  )["oracle"]


def _chosen(like: Score, nll, spent, index) -> Score:
  """The episodes of a pool (M, W, E) that `index` (W, E) picks."""
  return Score(
    nll=np.take_along_axis(nll, index[None], 0)[0],
    spent=np.take_along_axis(spent, index[None, ..., None], 0)[0],
    tokens=like.tokens,
  )


def _oracle_schedule(
  level: TwoLevels, pool: np.ndarray, own: np.ndarray
) -> np.ndarray:
  """Upper levels on the tokens with the largest true own-step gain.

  The gain of an axis is the difference of a token's mean log-likelihood over
  the schedules that gave it the upper and the lower level: (W, E, T).
  """
  corner = np.zeros(int(level.lookup.max()) + 1, np.int64)
  # Where an axis has one level only, several corners share an action.
  for index in range(8):
    corner[level.lookup[index]] = index
  upper = (corner[pool][..., None] >> np.array([2, 1, 0])) & 1
  out = np.zeros((*pool.shape[1:], 3), bool)
  for axis in range(3):
    share = level.shares[axis]
    if share >= 1 or share <= 0:
      out[..., axis] = share >= 1
      continue
    high = upper[..., axis].astype(bool)
    count_high = np.maximum(high.sum(0), 1)
    count_low = np.maximum((~high).sum(0), 1)
    gain = (own * high).sum(0) / count_high - (own * ~high).sum(0) / count_low
    out[..., axis] = gain >= np.quantile(gain, 1 - share)
  return level.pick(out).astype(np.int16)


def rows(
  comparison: Comparison,
  *,
  asked: Sequence[float],
  policy_share: Sequence[float],
  common: dict[str, Any],
) -> list[dict[str, Any]]:
  """Result rows, one per method and budget, and one per static point.

  Args:
    comparison: the scores.
    asked: net keep rates that were asked.
    policy_share: the policy's own FLOPs and bytes as shares of a dense step.
    common: columns of every row (system, model, data, seeds, ...).
  """
  out = []
  ours_name = next(iter(comparison.policies))
  ours = comparison.policies[ours_name]
  paired = evaluate_lib.paired_difference

  def add(role, name, score, asked_for=None, against=None):
    row = common | {
      "method": name,
      "role": role,
      "budget": score.net_keep,
      "asked": asked_for,
      "metric": "perplexity",
      "value": score.perplexity,
      "nll": score.mean_nll,
      "kappa": score.means[0],
      "rho": score.means[1],
      "bits": score.means[2] * 16,
      "tokens": int(score.tokens.sum()),
    }
    mean, low, high = paired(score, comparison.dense)
    row |= {
      "delta_dense": mean,
      "low": float(np.exp(comparison.dense.mean_nll + low)),
      "high": float(np.exp(comparison.dense.mean_nll + high)),
    }
    if against is not None:
      mean, low, high = paired(against, score)
      row |= {
        "policy_minus_method": mean,
        "policy_minus_method_low": low,
        "policy_minus_method_high": high,
      }
    own = np.asarray(policy_share) if role == "ours" else np.zeros(2)
    flops, moved = score.further + own
    out.append(row | {"flops": float(flops), "bytes": float(moved)})

  add("reference", "dense", comparison.dense)
  for name, scores in comparison.policies.items():
    for i, score in enumerate(scores):
      add("ours", name, score, asked[i])
  for role, group in (
    ("baseline", comparison.baselines),
    ("oracle", comparison.oracles),
  ):
    for name, scores in group.items():
      for i, score in enumerate(scores):
        add(role, name, score, asked[i], against=ours[i])
  for name, score in comparison.static.items():
    add("static", name, score)
  for i, trials in enumerate(comparison.trials):
    out.append(
      common
      | {
        "method": "random trials",
        "role": "distribution",
        "budget": ours[i].net_keep,
        "metric": "perplexity quantiles 0, 5, 50, 95, 100%",
        "value": np.exp(np.quantile(trials, [0, 0.05, 0.5, 0.95, 1])),
      }
    )
  return out
