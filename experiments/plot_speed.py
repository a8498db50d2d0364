"""Draws a result of bench.py over the length of texts: ours and its peers.

  python experiments/plot_speed.py \
    --bench=experiments/results/h200/ops_chunked_attention.json \
    --plot=docs/chunked_attention.png

A panel a pass, a line an implementation or peer; both axes are logarithmic. The
rows must be of one op, and hold the length as the suite `ops` writes it.
"""

import pathlib

from absl import flags

import cli
from models.errors import InputError

_BENCH = flags.DEFINE_string("bench", None, "result file of bench.py")
_TITLE = flags.DEFINE_string("title", None, "of the picture; the op's name")
_PLOT = flags.DEFINE_string("plot", "runs/speed.png", "PNG to write")


def main(_) -> None:
  """Draws; see the module's docstring."""
  if not _BENCH.value:
    raise InputError("--bench: not given: name a result of bench.py's ops")
  cli.check_path(_BENCH.value)

  from research.bench import speed_plot

  path = pathlib.Path(_PLOT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  speed_plot.plot(path, pathlib.Path(_BENCH.value), _TITLE.value)
  print(f"plot: {path}")


if __name__ == "__main__":
  cli.run(main)
