"""Quantized models beside each other, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Rows = Sequence[Mapping[str, Any]]
_TASK = "_acc"


def table(rows: Rows) -> str:
  """One line a model and recipe; of several training seeds their mean."""
  return _table(rows, _line)


def tasks(rows: Rows) -> str:
  """The same of tasks: shares of right answers, and how far from float."""
  return _table(rows, _answers)


def _table(rows: Rows, line) -> str:
  several = len({row["model"] for row in rows}) > 1
  lines = [
    ({"model": model} if several else {}) | line(found)
    for (model, _), found in _by_method(rows).items()
  ]
  return markdown_table(lines, list(lines[0]))


def _by_method(rows: Rows) -> dict[tuple[str, str], list]:
  found: dict[tuple[str, str], list] = {}
  for row in rows:
    found.setdefault((row["model"], row["method"]), []).append(row)
  return found


def _line(rows: Rows) -> dict[str, str]:
  first, by = rows[0], _means(rows)
  kl = {
    f"KL at {name.removeprefix('kl_')}": f"{row['value']:.4f}"
    for name, row in by.items()
    if name.startswith("kl_")
  }
  found = {
    "recipe": first["method"],
    "what": first["what"],
    "MB": f"{by['perplexity']['bytes'] / 1e6:,.1f}",
    "perplexity": f"{by['perplexity']['value']:,.2f}",
    "change": _percent(by["ratio"]),
    "token by token": _percent(by["decoding_ratio"]),
  }
  seeds = [
    f"{100 * (row['value'] - 1):+.2f}"
    for row in rows
    if "seed" in row and row["metric"] == "decoding_ratio"
  ]
  if seeds:
    found["of each seed"] = ", ".join(seeds)
  repetition = f"{by['repetition']['value']:.3f}"
  return {**found, **kl, "repetition": repetition}


def _answers(rows: Rows) -> dict[str, str]:
  by = _means(rows)
  found = {"recipe": rows[0]["method"]}
  names = [n.removesuffix(_TASK) for n in by if n.endswith(_TASK)]
  for name in names:
    acc, change = by[f"{name}{_TASK}"], by[f"{name}_change"]
    found[name] = f"{100 * acc['value']:.1f}% {_ends(acc)}"
    found[f"{name}, change"] = f"{100 * change['value']:+.1f} {_ends(change)}"
  return found


def _means(rows: Rows) -> dict[str, Mapping[str, Any]]:
  """Rows by metric, without those of one training seed among several."""
  return {row["metric"]: row for row in rows if "seed" not in row}


def _percent(row: Mapping[str, Any]) -> str:
  low, high = (100 * (row[end] - 1) for end in ("low", "high"))
  return f"{100 * (row['value'] - 1):+.2f}% [{low:+.2f}, {high:+.2f}]"


def _ends(row: Mapping[str, Any]) -> str:
  return f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
