"""Models that recall what stood in a text, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
  """A line a model and length, a column a number of pairs."""
  counts = sorted({row["pairs"] for row in rows})
  lines: dict[tuple, dict[str, str]] = {}
  for row in rows:
    key = row["data"], row["length"], row["model"]
    line = lines.setdefault(
      key,
      {
        "task": row["data"],
        "tokens": f"{row['length']:,}",
        "model": row["model"],
        "parameters": f"{row['parameters']:,}",
        "bytes kept": f"{row['cache_bytes']:,}",
        "seeds": str(row["seeds"]),
        **{f"{count} pairs": "" for count in counts},
      },
    )
    line[f"{row['pairs']} pairs"] = _share(row)
  return markdown_table(list(lines.values()), list(next(iter(lines.values()))))


def _share(row: Row) -> str:
  if row["seeds"] == 1:
    return f"{row['value']:.3f}"
  return f"{row['value']:.3f} ± {(row['high'] - row['low']) / 2:.3f}"
