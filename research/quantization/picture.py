"""A picture of recipes: quality against bytes of weights."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from research.core import plots
from research.quantization.comparison import FLOAT

_OURS = "Quamba2"


def plot(
  path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]], title: str
) -> None:
  """Draws what decoding loses, as paired ratios, against bytes of weights."""
  points = [
    row
    for row in rows
    if row["metric"] == "decoding_ratio" and "seed" not in row
  ]
  groups: dict[str, list] = {}
  for row in points:
    groups.setdefault(row["idea"], []).append(row)
  series = [
    plots.Series(
      name,
      [row["bytes"] / 1e6 for row in own],
      *([row[key] for row in own] for key in ("value", "low", "high")),
      role={_OURS: "ours", FLOAT: "oracle"}.get(name, "baseline"),
    )
    for name, own in groups.items()
  ]
  values = [row["value"] for row in points]
  plots.pareto_plot(
    path,
    series,
    "weights (MB)",
    "perplexity, times that of the float model (less is better)",
    title,
    subtitle=f"{points[0]['model']} on"
    f" {pathlib.Path(points[0]['data']).name}, decoded token by token;"
    " paired 95% intervals",
    log_y=max(values) > 1.5,
  )
