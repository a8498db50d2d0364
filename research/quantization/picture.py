"""A picture of recipes: quality against bytes of weights."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from models import input_files
from models.errors import InputError
from research.core import plots
from research.quantization.comparison import FLOAT

_OURS = "Quamba2"
# Of a number that has no format.
_FLOAT_BITS = 16


def plot(
  path: str | pathlib.Path,
  rows: Sequence[Mapping[str, Any]],
  *,
  bits: bool = False,
) -> None:
  """Draws perplexities, as paired ratios, against what the weights take.

  A recipe is left out where another one of the same idea takes no more and
  loses no more.

  Args:
    path: of the PNG.
    rows: of a result file.
    bits: draws what a held-out text loses as a whole, against bits a weight of
      all that is kept; else what decoding it loses, against bytes.
  """
  points = [
    row
    for row in rows
    if row["metric"] == ("ratio" if bits else "decoding_ratio")
    and "seed" not in row
  ]
  size = lambda row: _FLOAT_BITS * row["budget"] if bits else row["bytes"] / 1e6
  groups: dict[str, list] = {}
  for row in sorted(points, key=lambda row: (size(row), row["value"])):
    own = groups.setdefault(row["idea"], [])
    if not own or row["value"] < own[-1]["value"]:
      own.append(row)
  series = [
    plots.Series(
      name,
      [size(row) for row in own],
      *([row[key] for row in own] for key in ("value", "low", "high")),
      role={_OURS: "ours", FLOAT: "oracle"}.get(name, "baseline"),
    )
    for name, own in groups.items()
  ]
  values = [row["value"] for own in groups.values() for row in own]
  how = "scored as a whole" if bits else "decoded token by token"
  plots.pareto_plot(
    path,
    series,
    "bits a weight, of all that is kept" if bits else "weights (MB)",
    "perplexity, times that of the float model (less is better)",
    f"{'Formats' if bits else 'Recipes'} by size and perplexity",
    subtitle=f"{points[0]['model']} on"
    f" {pathlib.Path(points[0]['data']).name}, {how}; paired 95% intervals",
    log_y=max(values) > 1.5,
  )


def plot_result(path: pathlib.Path, source: pathlib.Path) -> None:
  """Draws the recipes of a result file over bytes, see `plot`.

  Args:
    path: of the PNG.
    source: result of eval_quantized.py.

  Raises:
    InputError: the file is damaged, or nothing in it was decoded.
  """
  result = input_files.read_json(source)
  with input_files.errors_at(source, wrong="is no result of eval_quantized.py"):
    rows = result["rows"]
    decoded = any(row["metric"] == "decoding_ratio" for row in rows)
    if decoded:
      plot(path, rows)
  if not decoded:
    raise InputError(f"{source}: nothing in it was decoded: give --rows there")
