"""Draws the held-out perplexity of several runs of train_lm.py on one plot.

  python experiments/plot_lm.py --runs=runs/lm_a,runs/lm_b --plot=runs/lm.png

Over tokens on the left, over the time of updates on the right. Runs of one name
(--names=a,a,b,b) are seeds, of which the mean is drawn and told. Takes seconds;
runs that are still under way are drawn as far as they are. --result names the
device and commit of the runs, where all are finished and have the same.
"""

import pathlib

from absl import flags

import cli
from models.errors import InputError

_RUNS = flags.DEFINE_list("runs", [], "workdirs of train_lm.py")
_NAMES = flags.DEFINE_list(
  "names",
  [],
  "of the runs, in the legend; their folders' if not given; the same name for "
  "seeds of one run",
)
_TIMES = flags.DEFINE_bool(
  "times", True, "tell times; none where other work shared the device"
)
_TITLE = flags.DEFINE_string(
  "title", "Language models on the same tokens", "of the plot"
)
_PLOT = flags.DEFINE_string("plot", "runs/lm.png", "PNG to write")
_COSTS = cli.integer(
  "costs",
  None,
  "also tell what models keep of so many tokens, and attention's work",
  1,
)
_COST_PLOT = flags.DEFINE_string(
  "cost_plot", None, "PNG of perplexity over those costs; wants --costs"
)
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")


def main(_) -> None:
  """Draws; see the module's docstring."""
  folders = [pathlib.Path(name) for name in _RUNS.value]
  names = _NAMES.value or [folder.name for folder in folders]
  if not folders:
    raise InputError("--runs: there is none: name workdirs of train_lm.py")
  if len(names) != len(folders):
    raise InputError(
      f"--names: {len(names)} names for {len(folders)} runs: give one for each"
    )
  for folder in folders:
    cli.check_path(folder)
  if _COST_PLOT.value and not _COSTS.value:
    raise InputError("--cost_plot: give --costs, such as --costs=8192")
  from research.language_model import costs, curves

  found = [
    curves.read(folder, name)
    for folder, name in zip(folders, names, strict=True)
  ]
  path = pathlib.Path(_PLOT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  curves.plot(path, found, _TITLE.value, _TIMES.value)
  rows = curves.rows(found, _TIMES.value)
  if _COSTS.value:
    rows = costs.add(rows, found, _COSTS.value)
  if _COST_PLOT.value:
    costs.plot(pathlib.Path(_COST_PLOT.value), rows, _TITLE.value)
  columns = {
    "model": "run",
    "budget": "tokens",
    "value": "perplexity",
    "sd": "sd",
    "seeds": "seeds",
  }
  if _TIMES.value:
    columns |= {"seconds": "seconds", "tokens_per_second": "tokens/s"}
    columns |= {"mfu": "MFU"}
  if _COSTS.value:
    columns |= {"parameters": "parameters", "cache_bytes": "bytes kept"}
    columns |= {"mixing_flops": "FLOPs of attention"}
  cli.show(rows, columns)
  if _RESULT.value:
    # The seconds are those of the updates of all runs.
    seconds = sum(float(curve.seconds[-1]) for curve in found)
    origin = curves.shared_origin(found)
    cli.write_result(_RESULT.value, rows, cli.command(), seconds, **origin)
  print(f"plot: {path}")


if __name__ == "__main__":
  cli.run(main)
