"""How work scales over devices, as Markdown and as a picture.

A row's efficiency is its rate a device over that of the row of one device that
does the same: model, length and group; with weak scaling a device keeps its
rows, with strong scaling all devices share them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Row = Mapping[str, Any]

_KINDS = {"sol": "SOL, ", "rlm": "regression LM ", "ssd": "ssd ",
          "attention": "attention "}  # fmt: skip

_COLUMNS = {
  "group": "group",
  "work": "work",
  "batch": "rows",
  "length": "tokens",
  "mesh": "mesh",
  "ms": "ms",
  "efficiency": "efficiency",
  "gib_per_device": "GiB a device",
  "collective_ms": "collectives, ms",
  "exposed_ms": "of them exposed, ms",
  "tflops_per_device": "TFLOP/s a device",
}
_LOSSES = {
  "model": "model",
  "batch": "rows",
  "length": "tokens",
  "updates": "updates",
  "mesh": "mesh",
  "most_relative": "most from one device",
  "moved_to": "goes on on",
  "most_relative_moved": "most then",
}


def table(rows: Sequence[Row]) -> str:
  """A line a case that was timed, and below them what failed and why."""
  timed = [row for row in rows if "ms" in row]
  groups = list(dict.fromkeys(row["group"] for row in timed))
  works = list(dict.fromkeys(work(row) for row in timed))
  timed.sort(key=lambda r: (groups.index(r["group"]), works.index(work(r))))
  lines = [{**row, "work": work(row)} for row in with_efficiency(timed)]
  for line in lines:
    if line["efficiency"] is not None:
      line["efficiency"] = f"{line['efficiency']:.1%}"
  used = {key for line in lines for key, value in line.items()
          if value is not None}  # fmt: skip
  text = markdown_table(lines, {k: v for k, v in _COLUMNS.items() if k in used})
  for row in rows:
    if "failed" in row:
      text += f"\n`{row['case']}` failed: {row['failed']}\n"
  return text


def losses(rows: Sequence[Row]) -> str:
  """A line a comparison of losses: the largest relative difference."""
  return markdown_table(
    [row for row in rows if "most_relative" in row], _LOSSES
  )


def work(row: Row) -> str:
  """What a row computes, in words."""
  return f"{_KINDS.get(row['kind'], '')}{row['model']}"


def with_efficiency(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Rows with "efficiency", None where one device has not been timed."""
  key = lambda row: tuple(row[k] for k in ("group", "kind", "model", "length"))
  rate = lambda row: row["tokens_per_second"] / row["devices"]
  alone = {key(row): rate(row) for row in rows if row["devices"] == 1}
  return [
    {**row, "efficiency": rate(row) / alone[key(row)]}
    if key(row) in alone
    else {**row, "efficiency": None}
    for row in rows
  ]
