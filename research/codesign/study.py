"""Searches a problem, and says how far each search is from the whole front."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.codesign import problem as problem_lib
from research.codesign.accuracies import Accuracies
from research.codesign.problem import NETWORK, Problem
from research.core import files
from research.search import Exhaustive, Found, named, pareto, run
from research.search.running import Evaluate

# The reference lies beyond the worst values of the whole space by this share of
# their range.
_MARGIN = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is searched, and how.

  Attributes:
    objectives: names, of `problem.OBJECTIVES`.
    methods: of `search.METHODS`; exhaustive is always run.
    budget: evaluations of every other method.
    seeds: of every other method.
    least_accuracy: of the point that is chosen; None chooses none.
  """

  objectives: tuple[str, ...] = ("error", "latency_ms")
  methods: tuple[str, ...] = ("random", "genetic", "regularised", "reinforce")
  budget: int = 100
  seeds: int = 8
  least_accuracy: float | None = None


def check(plan: Plan) -> None:
  """Raises InputError where a name is unknown."""
  problem_lib.objectives(plan.objectives)
  for name in plan.methods:
    named(name)
  if plan.least_accuracy is not None and "error" not in plan.objectives:
    raise InputError("--least_accuracy: needs the objective error")


def everything(
  problem: Problem,
  plan: Plan,
  evaluate: Evaluate,
  advance: Callable[[int], None] | None = None,
) -> Found:
  """All points of a problem."""
  return run(
    problem.space(),
    evaluate,
    Exhaustive(),
    objectives=plan.objectives,
    advance=advance,
  )


def front_rows(
  problem: Problem, plan: Plan, whole: Found, accuracies: Accuracies | None
) -> list[dict[str, Any]]:
  """Rows of the front, each with all costs and where its accuracy is from.

  Raises:
    InputError: no point has a finite value of every objective.
  """
  # Of points that are equal in all objectives the first stands for all.
  equal = {tuple(whole.values[at]): at for at in reversed(whole.front())}
  places = list(reversed(equal.values()))
  if not places:
    raise InputError(
      "no network of the space has an accuracy: give --accuracies of its "
      "sizes, or a --predictor"
    )
  chosen = _chosen(plan, whole)
  return [
    point_row(problem, whole, at, accuracies)
    | {"kind": "front", "chosen": at == chosen}
    for at in places
  ]


def point_row(
  problem: Problem, found: Found, place: int, accuracies: Accuracies | None
) -> dict[str, Any]:
  """One point: decisions, all costs, and its accuracy's value and source."""
  genome = found.genomes[place]
  values = found.space.described(genome)
  costs = problem.costs(found.space.columns([genome]))
  costs = {name: value[0].item() for name, value in costs.items()}
  row = values | costs
  key = tuple(values[name] for name in NETWORK)
  if accuracies is not None and key in accuracies.by_network:
    row["accuracy"] = accuracies.by_network[key]
    row["accuracy_is"] = accuracies.source[key]
  return row


def measured_rows(accuracies: Accuracies) -> list[dict[str, Any]]:
  """Rows of all measured accuracies, which `accuracies.read` takes again."""
  return [
    dict(zip(NETWORK, key))
    | {
      "kind": "measured",
      "accuracy": accuracies.by_network[key],
      "seeds": seeds,
    }
    for key, seeds in accuracies.seeds.items()
  ]


def search_rows(
  plan: Plan,
  whole: Found,
  evaluate: Evaluate,
  advance: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
  """Rows of every method: its mean regret over seeds, to the whole front."""
  finite = whole.values[np.isfinite(whole.values).all(1)]
  low, high = finite.min(0), finite.max(0)
  best = pareto.normalised(finite, low, high)
  best = best[pareto.front(best)]
  reference = np.full(len(plan.objectives), 1 + _MARGIN)
  rows = []
  for name in plan.methods:
    regrets, epsilons, evaluations = [], [], []
    for seed in range(plan.seeds):
      found = run(
        whole.space,
        evaluate,
        named(name),
        budget=plan.budget,
        seed=seed,
        objectives=plan.objectives,
      )
      values = pareto.normalised(found.values, low, high)
      regrets.append(pareto.regret(values, best, reference))
      epsilons.append(pareto.epsilon(values, best))
      evaluations.append(len(found.genomes))
      if advance is not None:
        advance(1)
    rows.append(
      {
        "kind": "search",
        "method": name,
        "budget": plan.budget,
        "evaluations": float(np.mean(evaluations)),
        "points": len(whole.genomes),
        "seeds": plan.seeds,
        "regret": float(np.mean(regrets)),
        "regret_least": float(np.min(regrets)),
        "regret_greatest": float(np.max(regrets)),
        "epsilon": float(np.mean(epsilons)),
      }
    )
  return rows


def _chosen(plan: Plan, whole: Found) -> int | None:
  """The point that suffices and is least in what comes next; None for none."""
  if plan.least_accuracy is None:
    return None
  at = plan.objectives.index("error")
  others = [i for i in range(len(plan.objectives)) if i != at]
  enough = [
    place
    for place in whole.front()
    if whole.values[place, at] <= 1 - plan.least_accuracy + 1e-12
  ]
  if not enough:
    return None
  return min(enough, key=lambda place: tuple(whole.values[place, others]))


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows as a table, with all columns of any."""
  names = dict.fromkeys(name for row in rows for name in row)
  stream = io.StringIO()
  writer = csv.DictWriter(stream, list(names), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  files.write_text(path, stream.getvalue())
