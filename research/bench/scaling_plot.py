"""Efficiency over the number of devices, as PNG."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from models import input_files
from models.errors import InputError
from research.core import plots
from research.core.plots import Series
from research.results import scaling

# Groups that are drawn -> their panels.
_PANELS = {"weak": "weak", "methods": "weak", "strong": "strong"}


def plot(path: pathlib.Path, source: pathlib.Path) -> None:
  """Draws panels of weak and strong scaling, a line a model and axis.

  Args:
    path: of the PNG.
    source: result of `launch/reproduce/scaling.sh`.

  Raises:
    InputError: the file is damaged, or nothing in it ran on several devices.
  """
  result = input_files.read_json(source)
  with input_files.errors_at(source, wrong="is no result of time_mesh.py"):
    lines = _lines([row for row in result["rows"] if "ms" in row])
    title = f"Rate a device, of that of one ({result['device']})"
  if not lines:
    raise InputError(
      f"{source}: no row of several devices beside its one: measure both"
    )
  names = dict.fromkeys(name for _, name in lines)
  panels = {
    f"devices, {panel} scaling": [
      # A line that another panel has alone has no point here.
      _series(name, lines.get((panel, name), {1: math.nan}))
      for name in names
    ]
    for panel in dict.fromkeys(panel for panel, _ in lines)
  }
  plots.panels_plot(path, panels, "efficiency", title, log_x=True)


def _series(name: str, points: Mapping[int, float]) -> Series:
  """A line; what are no language models stand apart by their roles."""
  roles = {"SOL": "ours", "regression": "oracle"}
  role = roles.get(name.replace(",", "").split()[0], "baseline")
  x = sorted(points)
  return Series(name=name, x=x, y=[points[each] for each in x], role=role)


def _lines(
  rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], dict[int, float]]:
  """Efficiency by devices, of each panel and line that has several."""
  lines: dict[tuple[str, str], dict[int, float]] = {}
  for row in scaling.with_efficiency(rows):
    panel = _PANELS.get(row["group"])
    if panel and row["efficiency"] is not None:
      axis = row["mesh"].partition(":")[0]
      name = f"{scaling.work(row)} {axis}"
      points = lines.setdefault((panel, name), {1: 1.0})
      points[row["devices"]] = row["efficiency"]
  return {key: points for key, points in lines.items() if len(points) > 1}
