"""Quantized models beside each other, as Markdown and as a picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from research.core import plots
from research.core.report import markdown_table
from research.quantization.recipes import LLAMA_CPP, RECIPES

Rows = Sequence[Mapping[str, Any]]
_OURS = "Quamba2"


def table(rows: Rows) -> str:
  """One line a model and recipe."""
  several = len({row["model"] for row in rows}) > 1
  lines = [
    ({"model": model} if several else {}) | _line(found)
    for (model, _), found in _by_method(rows).items()
  ]
  return markdown_table(lines, list(lines[0]))


def _by_method(rows: Rows) -> dict[tuple[str, str], Rows]:
  found: dict[tuple[str, str], list] = {}
  for row in rows:
    found.setdefault((row["model"], row["method"]), []).append(row)
  return found


def _line(rows: Rows) -> dict[str, str]:
  first = rows[0]
  by = {row["metric"]: row for row in rows}
  change = lambda row: (
    f"{100 * (row['value'] - 1):+.2f}% [{100 * (row['low'] - 1):+.2f},"
    f" {100 * (row['high'] - 1):+.2f}]"
  )
  kl = {
    f"KL at {name.removeprefix('kl_')}": f"{row['value']:.4f}"
    for name, row in by.items()
    if name.startswith("kl_")
  }
  return {
    "recipe": first["method"],
    "what": first["what"],
    "MB": f"{first['bytes'] / 1e6:,.1f}",
    "perplexity": f"{by['perplexity']['value']:,.2f}",
    "change": change(by["ratio"]),
    "token by token": change(by["decoding_ratio"]),
    **kl,
    "repetition": f"{by['repetition']['value']:.3f}",
  }


def plot(path: str | pathlib.Path, rows: Rows, title: str) -> None:
  """Draws perplexity of decoding against bytes of weights."""
  points = [row for row in rows if row["metric"] == "decoding_perplexity"]
  groups: dict[str, list] = {}
  for row in points:
    name = row["method"]
    if name in RECIPES:
      name = RECIPES[name].method
    elif name in LLAMA_CPP:
      name = "llama.cpp"
    groups.setdefault(name, []).append(row)
  series = [
    plots.Series(
      name,
      [row["bytes"] / 1e6 for row in own],
      *([row[key] for row in own] for key in ("value", "low", "high")),
      role={_OURS: "ours", "float": "oracle"}.get(name, "baseline"),
    )
    for name, own in groups.items()
  ]
  values = [row["value"] for row in points]
  plots.pareto_plot(
    path,
    series,
    "weights (MB)",
    "perplexity, token by token (less is better)",
    title,
    subtitle=f"{points[0]['model']} on {points[0]['data']}, 95% intervals",
    log_y=max(values) > 1.5 * min(values),
  )
