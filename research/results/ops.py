"""The rows of a benchmark of ops, as a table in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line an implementation, pass and peer; times in milliseconds.

  Args:
    rows: of `research.bench.suites.ops.run`.
  """
  lines = []
  for row in rows:
    keys = "op", "shape", "dtype", "pass", "implementation"
    line = {key: row[key] for key in keys} | {"ms": f"{row['ms']:,.3f}"}
    if row["peer_ms"] is not None:
      detail = row["peer_detail"]
      line["peer"] = f"{row['peer']}, {detail}" if detail else row["peer"]
      line["peer ms"] = f"{row['peer_ms']:,.3f}"
      line["ms / peer ms"] = f"{row['ms'] / row['peer_ms']:.2f}"
    line["floor ms"] = f"{row['floor_ms']:,.3f}"
    line["share"] = f"{row['share']:.1%}"
    for key in ("error", "error_full"):
      # JSON has null where it was not computed, or not finite.
      if row[key] is not None:
        line[key.replace("_", ", ")] = f"{row[key]:.1e}"
    lines.append(line)
  columns = (
    *("op", "shape", "dtype", "pass", "implementation", "ms", "peer"),
    *("peer ms", "ms / peer ms", "floor ms", "share", "error", "error, full"),
  )
  return markdown_table(lines, columns)
