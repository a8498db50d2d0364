"""Quantized models beside each other, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Rows = Sequence[Mapping[str, Any]]


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
