"""Models on Long Range Arena as Markdown: accuracies, and measured times."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
  """One line a model: accuracy, size, work, and times where they are known."""
  lines = [_line(row) for row in rows]
  empty = [key for key in lines[0] if not any(line[key] for line in lines)]
  return markdown_table(lines, [key for key in lines[0] if key not in empty])


def _line(row: Row) -> dict[str, str]:
  several = row["seeds"] > 1
  work = row.get("multiplications")
  return {
    "task": row["data"],
    "model": row["model"],
    "accuracy": f"{row['value']:.3f}",
    "95%": f"{row['low']:.3f} to {row['high']:.3f}",
    "seeds": f"{row['seeds']}" if several else "",
    "rate": f"{row['learning_rate']:g}",
    "parameters": f"{row['parameters']:,}",
    "of blocks": f"{row['block_parameters']:,}",
    "M multiplications": "" if work is None else f"{work / 1e6:,.1f}",
    "ms an update": _ms(row.get("update_ms")),
    "ms a sample, alone": _ms(row.get("sample_ms_1")),
    "of 256": _ms(row.get("sample_ms_256")),
  }


def _ms(value: float | None) -> str:
  return "" if value is None else f"{value:.3g}"


def times(rows: Sequence[Row]) -> str:
  """One line a model, a column a batch."""
  passes = dict.fromkeys((row["pass"], row["batch"]) for row in rows)
  lines = []
  for model in dict.fromkeys(row["model"] for row in rows):
    own = {
      (row["pass"], row["batch"]): row for row in rows if row["model"] == model
    }
    first = next(iter(own.values()))
    line = {
      "model": model,
      "blocks x width": f"{first['layers']} x {first['d_model']}",
      "parameters of blocks": f"{first['block_parameters']:,}",
      "M multiplications": f"{first['multiplications'] / 1e6:,.1f}",
    }
    for name, batch in passes:
      what = "update" if name == "update" else "pass"
      found = own.get((name, batch))
      line[f"{what} of {batch}, ms"] = _ms(found["ms"]) if found else ""
    lines.append(line)
  return markdown_table(lines, list(lines[0]))
