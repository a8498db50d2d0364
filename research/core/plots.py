"""Plots of a run as PNG, 1120 pixels wide, told apart without colour too."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.core import files
from research.core.metrics import without_timing

_DPI = 140
_WIDTH = 8.0
_INK = "#2b2b2b"
_FAINT = "#8a8a8a"
_OURS = "#d55e00"
# Okabe and Ito (2008): distinct under the common colour-vision deficiencies.
BASELINES = (
  "#0072b2",
  "#009e73",
  "#cc79a7",
  "#56b4e9",
  "#e69f00",
  "#6b4c9a",
  "#8c6d31",
  "#56564b",
)
_MARKERS = ("s", "^", "D", "v", "P", "X", "p", "h")

ROLES = ("ours", "baseline", "oracle", "reference")


@dataclasses.dataclass(frozen=True)
class Series:
  """One method in a Pareto plot.

  Attributes:
    name: as the legend says it.
    x: (N,) cost of each point.
    y: (N,) quality of each point.
    low: (N,) lower ends of the intervals, or None.
    high: (N,) upper ends of the intervals, or None.
    role: one of `ROLES`; a reference of one point is drawn as a level.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] | None = None
  high: Sequence[float] | None = None
  role: str = "baseline"


def pareto_plot(
  path: str | pathlib.Path,
  series: Sequence[Series],
  xlabel: str,
  ylabel: str,
  title: str,
  *,
  subtitle: str = "",
  log_y: bool = False,
) -> None:
  """Draws quality against cost: a line a method, a bar an interval.

  The legend stands beside the axes, in the order of the lines from the top.

  Args:
    path: of the PNG.
    series: methods; "ours" is drawn last, above the others.
    xlabel: what cost is, with its unit.
    ylabel: what quality is, and whether less is better.
    title: what the plot shows, in one line.
    subtitle: a second, fainter line; such as model, data and interval.
    log_y: logarithmic quality axis.

  Raises:
    ValueError: an unknown role, or lengths that differ.
  """
  for s in series:
    _check(s)
  figure, axes = new_figure((_WIDTH, 4.9))
  axis = axes[0][0]
  if log_y:
    axis.set_yscale("log")
  handles = {}
  baselines = [s.name for s in series if s.role == "baseline"]
  for s in sorted(series, key=lambda s: ROLES[::-1].index(s.role)):
    number = baselines.index(s.name) if s.role == "baseline" else 0
    handles[s.name] = draw(axis, s, number)
  axis.set_xlabel(xlabel, labelpad=8)
  axis.set_ylabel(ylabel, labelpad=8)
  ordered = sorted(series, key=_height, reverse=True)
  legend = axis.legend(
    [handles[s.name] for s in ordered],
    [s.name for s in ordered],
    loc="center left",
    bbox_to_anchor=(1.02, 0.5),
    frameon=False,
    labelspacing=0.9,
    handlelength=2.2,
  )
  for text, s in zip(legend.get_texts(), ordered, strict=True):
    text.set_fontweight("bold" if s.role == "ours" else "normal")
    text.set_color(_OURS if s.role == "ours" else _INK)
  headline(axis, title, subtitle)
  save(figure, path)


def panels_plot(
  path: str | pathlib.Path,
  panels: Mapping[str, Sequence[Series]],
  ylabel: str,
  title: str,
  *,
  log_x: bool = False,
  log_y: bool = False,
) -> None:
  """Draws the same methods over several costs, a panel each, on one height.

  Args:
    path: of the PNG.
    panels: what cost is, with its unit -> the methods over it; the same names
      in the same order in each.
    ylabel: what quality is, and whether less is better.
    title: what the plot shows, in one line.
    log_x: logarithmic cost axes.
    log_y: logarithmic quality axis.

  Raises:
    ValueError: an unknown role, lengths or names that differ, or no panel.
  """
  names = {tuple(s.name for s in series) for series in panels.values()}
  if len(names) != 1:
    raise ValueError("panels must hold the same methods in the same order")
  figure, (axes,) = new_figure((_WIDTH, 3.9), 1, len(panels))
  for axis, (xlabel, series) in zip(axes, panels.items(), strict=True):
    handles = []
    for number, s in enumerate(series):
      _check(s)
      handles.append(draw(axis, s, number))
    axis.set_xlabel(xlabel, labelpad=8)
    axis.sharey(axes[0])
    if log_y:
      log_scale(axis)
    if log_x:
      axis.set_xscale("log", base=2)
  axes[0].set_ylabel(ylabel, labelpad=8)
  longest = max(len(name) for name in (*names,)[0])
  figure.legend(
    handles,
    *names,
    loc="outside lower center",
    frameon=False,
    ncols=min(len(handles), 4 if longest < 18 else 3),
  )
  figure.suptitle(
    title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=_INK
  )
  save(figure, path)


def curves_plot(
  path: str | pathlib.Path,
  metrics: Sequence[Mapping[str, Any]],
  keys: Sequence[str] | None = None,
  title: str = "Training",
) -> None:
  """Draws the metrics of a run over its steps, a small panel for each.

  Faint: the numbers as logged; strong: their running mean.

  Args:
    path: of the PNG.
    metrics: lines of `metrics.jsonl` (`metrics.read_jsonl`).
    keys: which, in order; None takes all scalars but time, at most 12.
    title: what run this is.

  Raises:
    ValueError: there is nothing to draw.
  """
  keys = list(keys) if keys is not None else _scalar_keys(metrics)[:12]
  if not keys:
    raise ValueError("no scalar metrics to draw")
  columns = min(3, len(keys))
  rows = -(-len(keys) // columns)
  figure, axes = new_figure((_WIDTH, 0.7 + 2.0 * rows), rows, columns)
  panels = [axis for row in axes for axis in row]
  for axis, key in zip(panels, keys, strict=False):
    points = [
      (row["step"], row[key]) for row in metrics if row.get(key) is not None
    ]
    steps, values = np.asarray(points, np.float64).reshape(-1, 2).T
    axis.plot(steps, values, color=BASELINES[3], linewidth=0.8, alpha=0.6)
    axis.plot(steps, _running_mean(values), color=BASELINES[0], linewidth=1.8)
    axis.set_title(key, loc="left", fontsize=9.5, color=_INK)
    axis.locator_params(axis="both", nbins=5)
  for axis in panels[len(keys) :]:
    axis.set_visible(False)
  figure.supxlabel("step", fontsize=9.5, color=_INK)
  figure.suptitle(
    title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=_INK
  )
  save(figure, path)


def _check(s: Series) -> None:
  if s.role not in ROLES:
    raise ValueError(f"role {s.role!r} of {s.name}: one of {ROLES}")
  lengths = {len(v) for v in (s.x, s.y, s.low, s.high) if v is not None}
  if len(lengths) != 1 or 0 in lengths or (s.low is None) != (s.high is None):
    raise ValueError(f"x, y, low and high of {s.name} do not fit together")


def new_figure(size, rows: int = 1, columns: int = 1):
  """Figure and grid of axes in the house style, without global state."""
  # matplotlib takes long to import, and a figure made without pyplot needs no
  # display and leaves the settings of a notebook alone.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False)
  for axis in axes.flat:
    for side in ("top", "right"):
      axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
      axis.spines[side].set_color(_FAINT)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_INK, labelsize=9, color=_FAINT)
  return figure, axes


def draw(axis, s: Series, number: int):
  """Draws one series and returns its handle for the legend."""
  order = np.argsort(s.x, kind="stable")
  x, y = np.asarray(s.x, float)[order], np.asarray(s.y, float)[order]
  style = {
    "ours": {"color": _OURS, "marker": "o", "linewidth": 2.6, "markersize": 7},
    "baseline": {
      "color": BASELINES[number % len(BASELINES)],
      "marker": _MARKERS[number % len(_MARKERS)],
      "linewidth": 1.4,
      "markersize": 5,
    },
    "oracle": {
      "color": _INK,
      "marker": "*",
      "linewidth": 1.2,
      "linestyle": (0, (4, 2)),
      "markersize": 10,
    },
    "reference": {
      "color": _FAINT,
      "marker": "none",
      "linewidth": 1.4,
      "linestyle": (0, (1, 1.5)),
    },
  }[s.role]
  zorder = 3 + ROLES[::-1].index(s.role)
  if s.role == "reference" and len(x) == 1:
    return axis.axhline(y[0], zorder=zorder, **style)
  if s.low is not None:
    low, high = (np.asarray(v, float)[order] for v in (s.low, s.high))
    color = style["color"]
    axis.vlines(x, low, high, color=color, linewidth=1.4, zorder=zorder)
    if s.role == "ours":
      axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
  (line,) = axis.plot(
    x, y, zorder=zorder, markeredgecolor="white", markeredgewidth=0.8, **style
  )
  return line


def _height(s: Series) -> float:
  """Where a line stands among the others: its value at the least cost."""
  return float(np.asarray(s.y)[np.argmin(s.x)])


def log_scale(axis) -> None:
  """Logarithmic height with plain numbers, also within one decade."""
  from matplotlib import ticker

  axis.set_yscale("log")
  plain = ticker.LogFormatter(minor_thresholds=(2, 0.5))
  axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
  axis.yaxis.set_minor_formatter(plain)
  axis.tick_params(axis="y", which="minor", labelsize=9, labelcolor=_INK)


def headline(axis, title: str, subtitle: str) -> None:
  """Writes a bold title, and a fainter line under it, where it is not ""."""
  axis.set_title(
    title,
    loc="left",
    fontsize=13,
    fontweight="bold",
    color=_INK,
    pad=26 if subtitle else 12,
  )
  if subtitle:
    axis.annotate(
      subtitle,
      (0, 1),
      (0, 9),
      xycoords="axes fraction",
      textcoords="offset points",
      fontsize=9.5,
      color="#5c5c5c",
    )


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Mean over a twentieth of the run around each point, cut at both ends."""
  half = max(1, len(values) // 40)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  first = np.maximum(index - half, 0)
  end = np.minimum(index + half + 1, len(values))
  return (sums[end] - sums[first]) / (end - first)


def _scalar_keys(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
  """Names of scalar metrics in order of appearance, without step and time."""
  names = {}
  for row in metrics:
    for name, value in without_timing(row).items():
      if isinstance(value, int | float):
        names[name] = None
  return [name for name in names if name != "step"]


def save(figure, path: str | pathlib.Path) -> None:
  """Writes a figure as PNG, without the time in it."""
  with files.whole(path) as draft:
    figure.savefig(
      draft, format="png", facecolor="white", metadata={"Software": None}
    )
