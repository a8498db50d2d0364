"""Training runs of language models as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a training run."""
  lines = [
    {
      "model": row["model"],
      "tokens": f"{row['budget'] / 1e6:,.1f}M",
      "held-out perplexity": f"{row['value']:.2f}",
      "seconds of updates": f"{row['seconds']:,.0f}",
      "tokens/s": f"{row['tokens_per_second']:,.0f}",
      "MFU": "" if row["mfu"] is None else f"{row['mfu']:.1%}",
    }
    for row in rows
  ]
  return markdown_table(lines, list(lines[0]))
