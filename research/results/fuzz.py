"""What readers did with mutated files, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

_COLUMNS = {
  "format": "format",
  "mutations": "mutated files",
  "refused": "refused",
  "faults": "faults",
  "most_mb": "most memory, MB",
  "ms": "CPU ms a file",
  "slowest_ms": "slowest, ms",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a format: how many files were refused, faults, memory, time."""
  return markdown_table(rows, _COLUMNS)
