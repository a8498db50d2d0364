"""A picture of how heavy the tails of a model's kernels are, layer by layer."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import InputError
from research.core import plots
from research.core.plots import Series

# Fitted degrees of freedom end there: such a t is a normal distribution.
_NORMAL = 100


def plot(
  path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]], title: str
) -> None:
  """Draws degrees of freedom, and distances to both distributions.

  A panel each, a line a kind of kernel, a point a layer: the degrees of freedom
  of the likeliest t distribution, and how many times farther the likeliest
  normal one is away, by the distance of Kolmogorov and Smirnov.

  Args:
    path: of the PNG.
    rows: of `format_errors.tails`.
    title: of the picture.

  Raises:
    InputError: no kernel is one of several layers.
  """
  found: dict[str, dict[int, dict[str, float]]] = {}
  for row in rows:
    if row["method"] == "tails" and row.get("layer") is not None:
      of_kind = found.setdefault(_kind(row["data"]), {})
      of_kind.setdefault(row["layer"], {})[row["metric"]] = row["value"]
  if not found:
    raise InputError("--plot: no kernel is of several layers: leave it out")
  nu = {
    kind: {layer: own["nu"] for layer, own in layers.items()}
    for kind, layers in found.items()
  }
  farther = {
    kind: {
      layer: own["ks_normal"] / own["ks_t"] for layer, own in layers.items()
    }
    for kind, layers in found.items()
  }
  figure, (axes,) = plots.new_figure((9.2, 4.2), 1, 2)
  texts = (
    f"degrees of freedom ({_NORMAL}: normal)",
    "distance to normal, times that to t",
  )
  for axis, lines, text in zip(axes, (nu, farther), texts, strict=True):
    handles = [
      plots.draw(axis, Series(kind, [*points], [*points.values()]), number)
      for number, (kind, points) in enumerate(lines.items())
    ]
    plots.log_scale(axis)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer", labelpad=8)
    axis.set_title(text, loc="left", fontsize=9.5)
  figure.legend(
    handles, [*nu], loc="outside lower center", frameon=False, ncols=4
  )
  figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
  plots.save(figure, path)


def _kind(name: str) -> str:
  """The last word of a kernel's path that names it."""
  return name.removesuffix(".kernel").rpartition(".")[2]
