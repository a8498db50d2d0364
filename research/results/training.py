"""Training runs of language models as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a model; ± is the standard deviation between seeds."""
  lines = [_line(row) for row in rows]
  empty = [key for key in lines[0] if not any(line[key] for line in lines)]
  return markdown_table(lines, [key for key in lines[0] if key not in empty])


def _line(row: Mapping[str, Any]) -> dict[str, str]:
  spread = row.get("sd")
  between = "" if spread is None else f" ± {spread:.2f}"
  several = row.get("seeds", 1) > 1
  times = row["seconds"] is not None
  return {
    "model": row["model"],
    "tokens": f"{row['budget'] / 1e6:,.1f}M",
    "held-out perplexity": f"{row['value']:.2f}{between}",
    "least, greatest": f"{row['low']:.2f}, {row['high']:.2f}"
    if several
    else "",
    "seeds": f"{row['seeds']}" if several else "",
    "seconds of updates": f"{row['seconds']:,.0f}" if times else "",
    "tokens/s": f"{row['tokens_per_second']:,.0f}" if times else "",
    **_costs(row),
    "MFU": "" if row["mfu"] is None else f"{row['mfu']:.1%}",
  }


def _costs(row: Mapping[str, Any]) -> dict[str, str]:
  """Where they were counted: what is kept of a text, and attention's work."""
  if row.get("cache_bytes") is None:
    return {}
  kept = f"MB kept of {row['cache_tokens']:,} tokens"
  return {
    "parameters": f"{row['parameters'] / 1e6:.1f}M",
    kept: f"{row['cache_bytes'] / 1e6:.2f}",
    "MFLOP of attention a token": f"{row['mixing_flops'] / 1e6:.2f}",
  }
