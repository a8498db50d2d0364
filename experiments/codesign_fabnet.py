"""Searches FABNet and the accelerator that runs it together.

  python experiments/codesign_fabnet.py --objectives=latency_ms,dsp \
    --space=large --plot=front.png --csv=front.csv
  python experiments/codesign_fabnet.py --accuracies=lra_text.json \
    --task=text --predictor=ridge --least_accuracy=.627 --plot=front.png

The first takes costs alone, the second accuracies of trained networks, too:
results of train_lra.py, or a CSV with d_model, ratio (or d_ff), fourier_layers,
attention_layers and accuracy. Networks that were not trained are left out, or
predicted (--predictor; rlm takes a model of train_rlm.py, --rlm), and each row
says which. Latency is of a cycle model, not of an FPGA: --rules=released counts
as the published one, which leaves out passes, the FFT along the sequence and
all attention. The whole space is costed, and every method of --methods is told
by its regret to that front. Seconds.
"""

import time

from absl import flags

import cli
from models.errors import InputError

_SPACE = flags.DEFINE_string(
  "space", "published", "published (the 180 points of the paper) or large"
)
_DEVICE = flags.DEFINE_string("device", "vcu128", "FPGA that points must fit")
_MEMORY = flags.DEFINE_string(
  "memory", "even", "off-chip: hbm, ddr3, or even (the study of co-design)"
)
_ONLY = flags.DEFINE_list(
  "only", [], "values of decisions, such as p_be=120,d_model=64:128"
)
_LENGTH = cli.integer("length", 4000, "tokens of a sequence", 1, 1 << 20)
_RULES = flags.DEFINE_string("rules", "corrected", "corrected or released")
_ACCURACIES = flags.DEFINE_list(
  "accuracies", [], "files, or folders, with accuracies of trained networks"
)
_TASK = flags.DEFINE_string("task", "text", "that the accuracies are of")
_PREDICTOR = flags.DEFINE_string(
  "predictor", "none", "of the other networks: none, ridge, xgboost or rlm"
)
_RLM = flags.DEFINE_string("rlm", None, "folder of a regression language model")
_OBJECTIVES = flags.DEFINE_list(
  "objectives",
  ["error", "latency_ms"],
  "one to four of error, latency_ms, cycles, dsp, bram36, parameters",
)
_METHODS = flags.DEFINE_list(
  "methods", ["random", "genetic", "regularised", "reinforce"], "of search"
)
_BUDGET = cli.integer("budget", 100, "evaluations of each method", 1)
_SEEDS = cli.integer("seeds", 8, "of each method", 1, 1000)
_LEAST = cli.number(
  "least_accuracy",
  None,
  "the first in the next objective that has it is chosen",
  0.0,
  1.0,
)
_SEED = cli.integer("seed", 0, "of predictors", 0)
_PLOT = flags.DEFINE_string("plot", None, "PNG to write")
_CSV = flags.DEFINE_string("csv", None, "CSV of the front to write")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")


def _rlm():
  """What predicts accuracies of texts, or None."""
  if _PREDICTOR.value != "rlm":
    return None
  if not _RLM.value:
    raise InputError("--predictor=rlm: give --rlm, the folder of a model")
  cli.check_path(_RLM.value, "is missing: give the folder of a model")
  from research.codesign.problem import NETWORK
  from research.regression_lm import RegressionLM

  lm = RegressionLM.from_pretrained(_RLM.value)
  names = [column.get("name") for column in lm.info.get("columns") or []]
  if names != list(NETWORK) or lm.num_objectives != 1:
    raise InputError(
      f"--rlm={_RLM.value}: give a model of one target and the columns "
      f"{', '.join(NETWORK)}, in this order"
    )
  return lambda texts: lm.predict(texts, seed=_SEED.value).median[:, 0]


def main(_) -> None:
  """Searches; see the module's docstring."""
  began = time.perf_counter()
  from research.codesign import accuracies, problem, study

  given = problem.Problem(
    name=_SPACE.value, device=_DEVICE.value, memory=_MEMORY.value,
    length=_LENGTH.value, rules=_RULES.value,
    only=problem.only(_ONLY.value),
  )  # fmt: skip
  plan = study.Plan(
    objectives=tuple(_OBJECTIVES.value), methods=tuple(_METHODS.value),
    budget=_BUDGET.value, seeds=_SEEDS.value, least_accuracy=_LEAST.value,
  )  # fmt: skip
  study.check(plan)
  if _PLOT.value and len(plan.objectives) < 2:
    raise InputError("--plot: a picture needs two --objectives")
  space, known = given.space(), None
  if _ACCURACIES.value:
    known = accuracies.completed(
      accuracies.read(_ACCURACIES.value, _TASK.value),
      given.networks(), _PREDICTOR.value, seed=_SEED.value, rlm=_rlm(),
    )  # fmt: skip
  by_network = known and known.by_network
  evaluate = problem.evaluation(given, plan.objectives, by_network)
  from research.codesign import picture
  from research.core import progress
  from research.results import codesign as tables

  whole = study.everything(given, plan, evaluate)
  rows = study.front_rows(given, plan, whole, known)
  cli.say(f"{len(whole.genomes):,} of {len(space):,} points fit")
  if known and known.error is not None:
    cli.say(
      f"{_PREDICTOR.value}: off by {100 * known.error:.2f} points of accuracy "
      "on networks left out of its fit, in the mean"
    )
  print(tables.front(rows), end="")
  if _LEAST.value is not None and not any(row["chosen"] for row in rows):
    cli.say(f"no network has an accuracy of {_LEAST.value}: none is chosen")
  runs = len(plan.methods) * plan.seeds
  rows += study.search_rows(
    plan, whole, evaluate, progress.counter("search", runs)
  )
  if plan.methods:
    print(tables.searches(rows), end="")
  if _CSV.value:
    study.write_csv(_CSV.value, [row for row in rows if row["kind"] == "front"])
    print(f"csv: {_CSV.value}")
  if _PLOT.value:
    picture.plot(_PLOT.value, whole, given, known)
    print(f"plot: {_PLOT.value}")
  more = {"objectives": list(plan.objectives), "task": _TASK.value}
  if known:
    rows += study.measured_rows(known)
    more["predictor_error"] = known.error
  cli.keep(_RESULT.value, rows, began, **more)


if __name__ == "__main__":
  cli.run(main)
