"""The summary of a program set as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

_COLUMNS = {
  "number": "number",
  "p5": "5%",
  "p50": "median",
  "p95": "95%",
  "p100": "largest",
  "spearman_latency": "Spearman to latency",
  "spearman_source_length": "to the length of the source",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a number: its range, and what goes with it."""
  return markdown_table(rows, _COLUMNS)
