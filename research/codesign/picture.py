"""A picture of a problem: all its points, and the front among them."""

import pathlib

import numpy as np

from research.codesign import problem
from research.codesign.accuracies import Accuracies
from research.codesign.problem import Problem
from research.core import plots
from research.search import Found

_LABELS = {
  "error": "accuracy (%)",
  "latency_ms": "latency of the cycle model (ms)",
  "cycles": "cycles of the model",
  "dsp": "DSPs (estimate)",
  "parameters": "parameters of the blocks",
  "bram36": "block RAMs of 36 kbit (estimate)",
}
# Points that are drawn at most beside the front.
_MOST = 20_000


def plot(
  path: str | pathlib.Path,
  whole: Found,
  given: Problem,
  accuracies: Accuracies | None,
) -> None:
  """Draws the first objective over the second.

  Of more objectives the others are not seen: the front is drawn as points then,
  which lie apart from a line of two.

  Args:
    path: of the PNG.
    whole: points with two objectives or more.
    given: whose points they are.
    accuracies: of the networks, or None.
  """
  first, second = whole.objectives[:2]
  finite = np.flatnonzero(np.isfinite(whole.values).all(1))
  drawn = finite[:: max(1, -(-len(finite) // _MOST))]
  front = whole.front()
  figure, axes = plots.new_figure((8.0, 4.6))
  axis = axes[0][0]
  axis.scatter(*_xy(whole, drawn), s=9, color=plots.BASELINES[3], alpha=0.5,
               linewidths=0, label=f"{len(finite):,} points")  # fmt: skip
  line = {"drawstyle": "steps-post", "linewidth": 1.6}
  if len(whole.objectives) > 2:
    line = {"linestyle": "none"}
  order = sorted(front, key=lambda at: whole.values[at, 1])
  axis.plot(*_xy(whole, order), color=plots.BASELINES[0], marker="o",
            markersize=5, markeredgecolor="white",
            label=f"front: {len(front)} points", **line)  # fmt: skip
  if second != "error":
    axis.set_xscale("log")
  if first != "error":
    axis.set_yscale("log")
  axis.set_xlabel(_LABELS[second], labelpad=8)
  axis.set_ylabel(_LABELS[first], labelpad=8)
  axis.legend(frameon=False, loc="best", fontsize=9)
  what = "cycles of a model, not of an FPGA"
  if accuracies is not None:
    kinds = sorted(set(accuracies.source.values()))
    what += f"; accuracies {' and '.join(kinds)}"
  title = f"FABNet and its accelerator on {given.device}"
  plots.headline(axis, title, f"L = {given.length}; {what}")
  plots.save(figure, path)


def _xy(whole: Found, places) -> tuple[list[float], list[float]]:
  first, second = whole.objectives[:2]
  read = lambda name, at: (
    100 * (1 - value) if name == "error" else problem.shown(name, value)
    for value in whole.values[places, at]
  )
  return list(read(second, 1)), list(read(first, 0))
