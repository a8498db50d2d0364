"""Puts finished runs of train_lra.py beside each other, and draws them.

  python experiments/plot_lra.py --runs=runs/a,runs/b --names=FABNet,FNet \
    --plot=runs/lra.png --result=runs/lra.json

A line a run: mean test accuracy of the seeds with a 95% interval, parameters.
The picture has validation accuracy over updates; with --times=FILE, a result of
time_lra.py, test accuracy over the measured time of an update instead, one task
a picture. --models names the rows of that file, one for each run.
"""

import pathlib
import time

from absl import flags

import cli
from models.errors import InputError

_RUNS = flags.DEFINE_list("runs", [], "workdirs of train_lra.py")
_NAMES = flags.DEFINE_list("names", [], "of the runs; folders' if not given")
_MODELS = flags.DEFINE_list("models", [], "of the runs in --times")
_TIMES = flags.DEFINE_string("times", None, "result file of time_lra.py")
_TITLE = flags.DEFINE_string("title", "Long Range Arena", "of the picture")
_PLOT = flags.DEFINE_string("plot", "runs/lra.png", "PNG to write")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")


def main(_) -> None:
  """Draws; see the module's docstring."""
  began = time.perf_counter()
  folders = [pathlib.Path(name) for name in _RUNS.value]
  names = _NAMES.value or [folder.name for folder in folders]
  models = _MODELS.value or names
  if not folders:
    raise InputError("--runs: there is none: name workdirs of train_lra.py")
  for flag, given in (("names", names), ("models", models)):
    if len(given) != len(folders):
      raise InputError(
        f"--{flag}: {len(given)} names for {len(folders)} runs: give one for "
        "each"
      )
  if _TIMES.value:
    cli.check_path(_TIMES.value)

  from research.lra import comparison, curves

  runs = comparison.read(folders, names, models, _TIMES.value)
  rows = comparison.rows(runs)
  cli.show(rows, comparison.columns(rows))
  path = pathlib.Path(_PLOT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  if _TIMES.value:
    curves.accuracy_over_time(path, rows, _TITLE.value)
  else:
    lines = {run.name: (run.lines, run.members) for run in runs}
    curves.plot(path, lines, _TITLE.value)
  origin = comparison.origin(runs)
  if _RESULT.value:
    seconds = sum(run.seconds for run in runs) or time.perf_counter() - began
    cli.write_result(_RESULT.value, rows, cli.command(), seconds, **origin)
    print(f"result: {_RESULT.value}")
  print(f"plot: {path}")


if __name__ == "__main__":
  cli.run(main)
