"""Joint searches of networks and accelerators, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Rows = Sequence[Mapping[str, Any]]


def front(rows: Rows) -> str:
  """One line a point of the front; the chosen one is marked."""
  lines = []
  for row in rows:
    if row["kind"] != "front":
      continue
    blocks = []
    for name, kind in (
      ("fourier_layers", "FBfly"),
      ("attention_layers", "ABfly"),
    ):
      if row[name]:
        blocks.append(f"{row[name]} {kind}")
    engine = f"{row['p_be']} x {row['p_bu']}"
    if row.get("p_head"):
      engine += f", attention {row['p_head']} x {row['p_qk']}"
    line = {
      "network": f"d {row['d_model']}, FFN x{row['ratio']}, "
      + " + ".join(blocks),
      "engines x units": engine,
    }
    if "accuracy" in row:
      line["accuracy"] = f"{100 * row['accuracy']:.1f}%"
      line["which is"] = row["accuracy_is"]
    line |= {
      "cycles": f"{row['cycles']:,}",
      "ms": f"{row['latency_ms']:,.3f}",
      "DSPs": f"{row['dsp']:,}",
      "block RAMs": f"{row['bram36']:,}",
      "parameters": f"{row['parameters']:,}",
    }
    if any(other.get("chosen") for other in rows):
      line["chosen"] = "yes" if row["chosen"] else ""
    lines.append(line)
  return markdown_table(lines, list(lines[0]))


def searches(rows: Rows) -> str:
  """One line a method: what it has not found of the front's hypervolume."""
  lines = [
    {
      "method": row["method"],
      "evaluations": f"{row['evaluations']:,.0f} of {row['points']:,}",
      "seeds": row["seeds"],
      "regret": f"{100 * row['regret']:.2f}% "
      f"[{100 * row['regret_least']:.2f}, {100 * row['regret_greatest']:.2f}]",
      "epsilon": f"{row['epsilon']:.3f}",
    }
    for row in rows
    if row["kind"] == "search"
  ]
  return markdown_table(lines, list(lines[0]))


def claims(rows: Rows) -> str:
  """One line a claim and size, with all lengths in a row."""
  groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault((row["claim"], row["size"]), []).append(row)
  lines = []
  for (claim, size), own in groups.items():
    beside = _shorts(own, "note_value")
    lines.append(
      {
        "claim": claim,
        "size": size,
        "L": ", ".join(str(row["length"]) for row in own),
        "published": _shorts(own, "published"),
        "released model": _shorts(own, "released"),
        "corrected": _shorts(own, "corrected"),
        "beside": own[0]["note"] + (beside and f": {beside}"),
      }
    )
  return markdown_table(lines, list(lines[0]))


def _shorts(rows: Rows, name: str) -> str:
  values = [row[name] for row in rows if row[name] is not None]
  return ", ".join(map(_short, values))


def _short(value: float) -> str:
  if isinstance(value, int):
    return f"{value:,}"
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
