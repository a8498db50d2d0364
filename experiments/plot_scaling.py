"""Draws how efficient training is on many devices.

  python experiments/plot_scaling.py \
    --result=experiments/results/h200/scaling.json --plot=runs/scaling.png

A panel each for weak and strong scaling, a line a model and axis of its mesh;
those of SOL and of regression LMs stand with weak scaling.
"""

import pathlib

from absl import flags

import cli
from models.errors import InputError

_RESULT = flags.DEFINE_string("result", None, "scaling.json of scaling.sh")
_PLOT = flags.DEFINE_string("plot", "runs/scaling.png", "PNG to write")


def main(_) -> None:
  """Draws; see the module's docstring."""
  if not _RESULT.value:
    raise InputError("--result: not given: name a result of scaling.sh")
  cli.check_path(_RESULT.value)

  from research.bench import scaling_plot

  path = pathlib.Path(_PLOT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  scaling_plot.plot(path, pathlib.Path(_RESULT.value))
  print(f"plot: {path}")


if __name__ == "__main__":
  cli.run(main)
