"""Formats beside each other, as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from research.core import intervals
from research.core.report import markdown_table

Rows = Sequence[Mapping[str, Any]]


def table(rows: Rows) -> str:
  """One line a format: bits a number, and decibels of each array."""
  found: dict[str, dict[str, str]] = {}
  for row in rows:
    if row["metric"] == "decibels":
      start = {"format": row["method"], "bits": f"{row['bits']:.3f}"}
      line = found.setdefault(row["method"], start)
      line[row["data"]] = f"{row['value']:.2f}"
  return markdown_table([*found.values()], _columns(found.values()))


def tails(rows: Rows) -> str:
  """One line an array: degrees of freedom, and distances.

  Those of several layers are their median, with the least and the most.
  """
  found: dict[str, dict[str, list[float]]] = {}
  for row in rows:
    if row["method"] == "tails":
      of_array = found.setdefault(row["data"], {})
      of_array.setdefault(row["metric"], []).append(row["value"])
  lines = [
    {"numbers of": data}
    | {metric: _spread(values) for metric, values in of_array.items()}
    for data, of_array in found.items()
  ]
  return markdown_table(lines, _columns(lines))


def _spread(values: Sequence[float]) -> str:
  text = f"{statistics.median(values):.3f}"
  if len(values) > 1:
    text += f" [{min(values):.3f}, {max(values):.3f}]"
  return text


def codebooks(rows: Rows) -> str:
  """One line a format: how much more than Lloyd-Max it errs, by array."""
  found: dict[str, dict[str, str]] = {}
  for row in rows:
    if row["metric"] == "over_lloyd_max":
      line = found.setdefault(row["method"], {"format": row["method"]})
      line[row["data"]] = f"{100 * row['value']:+.1f}%"
  return markdown_table([*found.values()], _columns(found.values()))


def precision(rows: Rows) -> str:
  """One line a method of `search_precision.py`, seeds together.

  The interval of several seeds is Student's t of their changes; that of one is
  the bootstrap of windows that its row holds.
  """
  found: dict[str, list] = {}
  for row in rows:
    if row["metric"] == "change":
      found.setdefault(row["method"], []).append(row)
  mean = lambda own, key: sum(row[key] for row in own) / len(own)
  change = lambda own: (
    intervals.of_mean([row["value"] for row in own])
    if len(own) > 1
    else [own[0][key] for key in ("value", "low", "high")]
  )
  lines = [
    {
      "method": method,
      "seeds": str(len(own)),
      "losses computed": f"{mean(own, 'evaluations'):,.0f}",
      "bits a weight": f"{mean(own, 'bits'):.3f}",
      "where it searched": f"{mean(own, 'search_loss'):.4f}",
      "held out, from uniform": "{:+.4f} [{:+.4f}, {:+.4f}]".format(
        *change(own)
      ),
    }
    for method, own in found.items()
  ]
  return markdown_table(lines, _columns(lines))


def _columns(lines) -> list[str]:
  return list(dict.fromkeys(name for line in lines for name in line))
