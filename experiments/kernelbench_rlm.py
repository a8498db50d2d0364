"""Milliseconds of PyTorch programs by regression LMs, whole problems held out.

  python experiments/kernelbench_rlm.py --path=FOLDER \
    --flagfile=experiments/flagfiles/rlm_kernelbench.flags --result=kb.json

One model for all GPUs, whose name is in the text, and for every fold of the
problems; every timing of --runs is predicted by models that saw no version of
its problem. Ridge on TF-IDF, one for each run, on the same folds, stands beside
them, once on the programs as they are and once on their canonical form. The
data does not ship: FOLDER has kernelbench_sources.jsonl.gz and
kernelbench_timings.csv.gz. Prints Spearman and more, each with a 95% bootstrap
interval in the JSON of --result. Two to three minutes on an H100; --limit=20
--steps=5 is a trial on a CPU. The same command goes on where a killed run was.
"""

import pathlib
import time

from absl import flags

import cli
import option_flags
from models.errors import InputError
from research.regression_lm.options import Options

_PATH = flags.DEFINE_string("path", None, "folder of the data")
_WORKDIR = flags.DEFINE_string("workdir", "runs/kernelbench", "of the run")
_RUNS = flags.DEFINE_list(
  "runs",
  ["H100_together", "L4_modal", "B200_together", "H100_Modal", "L4_GCP"],
  "whose timings are judged",
)
_FOLDS = cli.integer("folds", 5, "parts of the problems", 2, 100)
_MEMBERS = cli.integer("members", 2, "models of each fold", 1, 100)
_RENAMINGS = cli.integer(
  "renamings", 3, "forms of a program with other names", 0, 100
)
_MADE_UP = cli.integer(
  "made_up", 20000, "made-up programs as a second task; 0 for none", 0
)
_PEERS = flags.DEFINE_bool("peers", True, "judge ridge too")
_LIMIT = cli.integer("limit", 0, "problems at most; 0 takes all", 0)
_ANSWERS = flags.DEFINE_string("answers", None, "JSONL file of our answers")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
_OPTIONS = option_flags.define(Options)


def main(_) -> None:
  """Trains and judges; see the module's docstring."""
  began = time.perf_counter()
  if not _PATH.value:
    raise InputError("--path: give the folder of KernelBench's files")
  cli.check_path(_PATH.value)
  from research.regression_lm import evaluate
  from research.regression_lm.kernelbench import cross_validation, timings
  from research.regression_lm.kernelbench.plan import Plan

  plan = Plan(
    options=Options(**{name: flag.value for name, flag in _OPTIONS.items()}),
    runs=_RUNS.value,
    folds=_FOLDS.value,
    members=_MEMBERS.value,
    renamings=_RENAMINGS.value,
    made_up=_MADE_UP.value,
    peers=_PEERS.value,
    limit=_LIMIT.value,
  )
  rows = cross_validation.run(
    plan,
    timings.load(_PATH.value, plan),
    pathlib.Path(_WORKDIR.value),
    cli.say,
    _ANSWERS.value and pathlib.Path(_ANSWERS.value),
  )
  cli.show(evaluate.table_lines(rows))
  cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
