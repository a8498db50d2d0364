"""Formats beside each other, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

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
  """One line an array: degrees of freedom, and distances."""
  found: dict[str, dict[str, str]] = {}
  for row in rows:
    if row["method"] == "tails":
      line = found.setdefault(row["data"], {"numbers of": row["data"]})
      line[row["metric"]] = f"{row['value']:.3f}"
  return markdown_table([*found.values()], _columns(found.values()))


def _columns(lines) -> list[str]:
  return list(dict.fromkeys(name for line in lines for name in line))
