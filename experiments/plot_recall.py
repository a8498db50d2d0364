"""Puts finished runs of train_recall.py beside each other, and draws them.

  python experiments/plot_recall.py --runs=runs/recall_a,runs/recall_b \
    --plot=runs/recall.png --result=runs/recall.json

A line a model and length, a column a number of pairs: the share of right
answers, the mean of the seeds and half its 95% interval. The picture has the
shortest tested length.
"""

import pathlib

from absl import flags

import cli
from models.errors import InputError

_RUNS = flags.DEFINE_list("runs", [], "workdirs of train_recall.py")
_TITLE = flags.DEFINE_string("title", "Recall", "of the picture")
_PLOT = flags.DEFINE_string("plot", "runs/recall.png", "PNG to write")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")


def main(_) -> None:
  """Draws; see the module's docstring."""
  folders = [pathlib.Path(name) for name in _RUNS.value]
  if not folders:
    raise InputError("--runs: there is none: name workdirs of train_recall.py")

  from research.language_model import recall_report
  from research.results import recall

  rows, seconds, origin = recall_report.read(folders)
  print(recall.table(rows))
  path = pathlib.Path(_PLOT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  recall_report.plot(path, rows, _TITLE.value)
  if _RESULT.value:
    cli.write_result(_RESULT.value, rows, cli.command(), seconds, **origin)
    print(f"result: {_RESULT.value}")
  print(f"plot: {path}")


if __name__ == "__main__":
  cli.run(main)
