"""Trains an encoder on a task of Long Range Arena, and tests it.

  python experiments/train_lra.py \
    --flagfile=experiments/flagfiles/lra_tiny.flags

learns short ListOps with a FABNet in a minute on 2 CPU cores. ListOps and
Pathfinder32 are generated; --task=text, image and retrieval read --data=FOLDER,
in the formats of the benchmark.

--seeds=0,1,2 and --learning_rates=3e-4,1e-3 train all pairs at once, in one
program. Settings are chosen on validation data; the test data is looked at
once, by all seeds at the best rate, each with the parameters of its best
validation. Writes the run to --workdir: flags, metrics, checkpoints, curves,
`report.md`, and models in `model_SEED/`. The same command goes on where a
killed run was.
"""

import pathlib
import time

from absl import flags

import cli
import mesh_flags
import option_flags
from models.errors import InputError
from research.lra.options import Options
from research.lra.tasks import TASKS

flags.adopt_module_key_flags(mesh_flags)
_WORKDIR = flags.DEFINE_string("workdir", "runs/lra", "folder of the run")
_DATA = flags.DEFINE_string(
  "data", None, "folder of the task's files; None generates what can be"
)
_CACHE = flags.DEFINE_string(
  "cache", "runs/lra_data", "folder that generated data is kept in"
)
_SEEDS = cli.integers("seeds", [0], "of members", lower=0)
_RATES = cli.numbers(
  "learning_rates", [1e-3], "peaks that are tried", lower=1e-7, upper=10
)
_RESULT = flags.DEFINE_string("result", None, "JSON file of the test's rows")
_OPTIONS = option_flags.define(Options)


def main(_) -> None:
  """Trains and tests; see the module's docstring."""
  began = time.perf_counter()
  mesh_flags.check()
  options = Options(**{name: flag.value for name, flag in _OPTIONS.items()})
  for name, given in (("seeds", _SEEDS), ("learning_rates", _RATES)):
    # Members are told apart, and their models named, by both.
    if len(set(given.value)) < len(given.value):
      raise InputError(f"--{name}={given.value}: give each once")
  TASKS[options.task].check(_DATA.value)

  # After the flags were checked, so that a mistake is answered at once.
  from research.lra import data, training

  run = training.Run(
    options=options,
    data=data.Options.of(options, _DATA.value, _CACHE.value),
    workdir=pathlib.Path(_WORKDIR.value),
    seeds=tuple(_SEEDS.value),
    learning_rates=tuple(_RATES.value),
    mesh=mesh_flags.mesh(one=True),
  )
  rows = training.train(run, cli.say)
  for path in (run.workdir / "result.json", _RESULT.value):
    cli.keep(path, rows, began)


if __name__ == "__main__":
  cli.run(main)
