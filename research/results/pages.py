"""Decoding that reads some pages of a cache, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
  """A line a share of the pages, a column a choice of pages, of each text.

  Cells say how many nats a token more than with all pages, with the paired 95%
  interval; of needles how many are found, too. Moments minus bounds stand in a
  column of their own where a file has them.
  """
  parts = dict.fromkeys((row["task"], row["context"]) for row in rows)
  return "\n".join(
    _part([row for row in rows if (row["task"], row["context"]) == part])
    for part in parts
  )


def _part(rows: Sequence[Row]) -> str:
  dense, rest = rows[0], rows[1:]
  lines: dict[float, dict[str, str]] = {}
  for row in rest:
    line = lines.setdefault(
      row["budget"],
      {
        "pages asked": f"{row['budget']:g}",
        "read": f"{100 * row['pages_read']:.1f}%",
        "summaries": f"{100 / row['page_size']:.1f}%",
      },
    )
    line[row["method"]] = _cell(row)
    if "minus_bounds" in row:
      line["moments - bounds"] = _difference(row, "minus_bounds")
  head = f"{dense['model']} ({dense['dtype']}) on {dense['data']}, contexts of "
  head += f"{dense['context']:,} tokens read whole, pages of "
  head += f"{dense['page_size']}; "
  if dense["task"] == "needles":
    head += f"{dense['items']} numbers asked for, with all pages "
    head += f"{_found(dense)} found:"
  else:
    head += f"{dense['scored_tokens']:,} tokens scored behind {dense['items']} "
    head += f"of them, with all pages perplexity {dense['value']:.2f}:"
  columns = list(
    dict.fromkeys(name for line in lines.values() for name in line)
  )
  return f"{head}\n\n{markdown_table(list(lines.values()), columns)}"


def _cell(row: Row) -> str:
  more = _difference(row, "nats_more")
  return f"{_found(row)}; {more}" if row["task"] == "needles" else more


def _difference(row: Row, name: str) -> str:
  low, high = row[f"{name}_low"], row[f"{name}_high"]
  return f"{row[name]:+.3f} [{low:+.3f}, {high:+.3f}]"


def _found(row: Row) -> str:
  return f"{round(row['value'] * row['items'])} of {row['items']}"
