"""Markdown for `report.md`: tables and pictures."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from research.core import files


def format_cell(value: Any) -> str:
  """A value as table text: four significant digits, None as a dash."""
  if value is None:
    return "–"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    whole = abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.4g}"
  return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_table(
  rows: Sequence[Mapping[str, Any]],
  columns: Mapping[str, str] | Sequence[str],
) -> str:
  """A Markdown table, numbers to the right.

  Args:
    rows: one mapping a row; an absent key is shown as a dash.
    columns: keys in order, or key -> heading.

  Returns:
    The lines of the table, with a newline at the end.
  """
  if not isinstance(columns, Mapping):
    columns = {name: name for name in columns}
  cells = [[format_cell(row.get(key)) for key in columns] for row in rows]
  table = [[format_cell(heading) for heading in columns.values()], *cells]
  widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
  numeric = [
    all(isinstance(row.get(key), int | float | None) for row in rows)
    for key in columns
  ]
  rule = [
    "-" * (width - 1) + ":" if right else "-" * width
    for width, right in zip(widths, numeric, strict=True)
  ]
  lines = []
  for line in [table[0], rule, *table[1:]]:
    padded = [
      text.rjust(width) if right else text.ljust(width)
      for text, width, right in zip(line, widths, numeric, strict=True)
    ]
    lines.append("| " + " | ".join(padded) + " |\n")
  return "".join(lines)


def picture(caption: str, path: str | pathlib.Path) -> str:
  """A Markdown link to a picture, by its name: both lie in one folder."""
  return f"![{caption}]({pathlib.Path(path).name})\n"


def write_report(
  path: str | pathlib.Path, title: str, parts: Sequence[str]
) -> None:
  """Writes a Markdown page: a title, then `parts` as paragraphs."""
  text = "\n\n".join([f"# {title}", *(part.strip("\n") for part in parts)])
  files.write_text(path, text + "\n")
