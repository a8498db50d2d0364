"""What regression LMs and their peers predict, as Markdown."""

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from research.core import intervals
from research.core.report import markdown_table

_DENSITY = {
  "CRPS 1": "crps_1",
  "CRPS 2": "crps_2",
  "CRPS 2 given 1": "crps_2_given_1",
}
_COLUMNS = (
  "kendall",
  "kendall, without twins",
  "spearman",
  "mse",
  "mae",
  "mae, without twins",
  "crps",
  "coverage of 0.9",
  "coverage of 0.9, calibrated",
  "interval score of 0.9",
  "interval score of 0.9, calibrated",
)
# Paired differences that a page shows, and whether more is better.
_PAIRED = {"kendall": True, "spearman": True, "mae": False}
_SPREAD = "± is the standard deviation between seeds."


def densities(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a text: the model beside a second set of true points."""
  lines: dict[str, dict[str, Any]] = {}
  for row in rows:
    line = lines.setdefault(row["text"], {"text": row["text"]})
    short = "model" if row["method"] == "regression LM" else "truth"
    line[f"energy distance, {short}"] = f"{row['energy_distance']:.4f}"
    for name, key in _DENSITY.items():
      line[f"{name}, {short}"] = f"{row[key]:.4f}"
  names = ["text"]
  for measure in ("energy distance", *_DENSITY):
    names += [f"{measure}, model", f"{measure}, truth"]
  return markdown_table(list(lines.values()), names)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a target, size and method: means over seeds, and their spread."""
  shown = []
  for line in means_over_seeds(rows):
    cells = {
      "target": line["target"],
      "training rows": line["train"],
      "method": line["method"],
    }
    for name in _COLUMNS:
      if name in line:
        cells[name] = _cell(line, name)
    shown.append(cells | {"seeds": line["seeds"]})
  columns = [name for name in _COLUMNS if any(name in line for line in shown)]
  names = ["target", "training rows", "method", *columns, "seeds"]
  note = f"\n{_SPREAD}\n" if any(line["seeds"] > 1 for line in shown) else ""
  return markdown_table(shown, names) + note


def means_over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Means over seeds, and "METRIC sd", the standard deviation between them.

  A mean without the seeds that have no number would look better than it is: the
  metric is None where one is not finite, and "METRIC, not finite" counts them.

  Args:
    rows: of `research.regression_lm.evaluate.rows`, with "train". Rows of
      differences are left out; a null stands for what was not finite.
  """
  groups: dict[tuple, list[float]] = {}
  for row in rows:
    if ", minus" not in row["metric"]:
      key = (row["target"], row["train"], row["method"], row["metric"])
      value = math.nan if row["value"] is None else row["value"]
      groups.setdefault(key, []).append(value)
  lines: dict[tuple, dict[str, Any]] = {}
  for (target, train, method, metric), values in groups.items():
    line = lines.setdefault(
      (target, train, method),
      {"target": target, "train": train, "method": method},
    )
    gaps = sum(not math.isfinite(value) for value in values)
    line[metric] = None if gaps else statistics.fmean(values)
    line[f"{metric} sd"] = None if gaps else intervals.spread(values)
    if gaps:
      line[f"{metric}, not finite"] = gaps
    line["seeds"] = len(values)
  return list(lines.values())


def paired(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a difference "METRIC, minus PEER", the best peer of each seed.

  Better and worse count the seeds whose 95% interval excludes zero.
  """
  groups: dict[tuple, list[Mapping[str, Any]]] = {}
  for row in rows:
    metric, minus, peer = row["metric"].partition(", minus ")
    peer, twins, _ = peer.partition(", without twins")
    if minus and metric in _PAIRED and row["value"] is not None:
      key = (row["target"], row["train"], row["method"], metric, twins[2:])
      groups.setdefault(key, []).append(row | {"peer": peer})
  lines = []
  for (target, train, method, metric, twins), found in groups.items():
    sign = 1 if _PAIRED[metric] else -1
    bounds = [sorted((sign * row["low"], sign * row["high"])) for row in found]
    peers = collections.Counter(row["peer"] for row in found)
    mean = statistics.fmean(row["value"] for row in found)
    one = found[0] if len(found) == 1 else None
    cell = _signed(mean)
    lines.append(
      {
        "target": target,
        "training rows": train,
        "method": method,
        "metric": f"{metric}, {twins}" if twins else metric,
        "minus": ", ".join(f"{peer} ({n})" for peer, n in peers.items())
        if one is None
        else one["peer"],
        "difference": cell
        if one is None
        else f"{cell} [{_signed(one['low'])}, {_signed(one['high'])}]",
        "better": sum(low > 0 for low, _ in bounds),
        "worse": sum(high < 0 for _, high in bounds),
        "seeds": len(found),
      }
    )
  return markdown_table(lines, list(lines[0]))


# Parts of a target that a table of errors shows.
_PARTS = 6


def errors(rows: Sequence[Mapping[str, Any]]) -> str:
  """The parts of each target with the largest shares of its rank error."""
  shown: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    shown.setdefault(row["target"], []).append(row)
  lines = [
    {
      "target": row["target"],
      "part": row["part"],
      "tests": row["tests"],
      "median factor": f"{2 ** row['median_bits']:.2f}",
      "beyond 2x": f"{row['beyond_2x']:.1%}",
      "share of rank error": f"{row['share_of_rank_error']:.0%}",
    }
    for part in shown.values()
    for row in part[:_PARTS]
  ]
  return markdown_table(lines, list(lines[0]))


def _cell(line: Mapping[str, Any], name: str) -> str:
  if line[name] is None:
    return f"not finite ({line[f'{name}, not finite']} of {line['seeds']})"
  spread = f" ± {_digits(line[f'{name} sd'])}"
  return _digits(line[name]) + spread * (line["seeds"] > 1)


def _signed(value: float) -> str:
  return f"{value:+.4f}" if abs(value) < 1000 else f"{value:+,.0f}"


def _digits(value: float) -> str:
  return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.2e}"
