"""What runs came to that were killed, stopped and starved, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

_COLUMNS = {
  "check": "check",
  "trainer": "trainer",
  "times": "times",
  "faults": "faults",
  "seen": "what was seen",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a check and trainer: how often, faults, and what was seen."""
  return markdown_table([{**row, "seen": _seen(row)} for row in rows], _COLUMNS)


def _seen(row: Mapping[str, Any]) -> str:
  """What a check counts besides faults."""
  if row["check"] == "soak":
    return (
      f"{row['compiled_first']} programs compiled in the first fifth, "
      f"{row['compiled_later']} later; {row['memory_mb']:.0f} MB, "
      f"{row['grown_mb']:+.1f} since the second fifth"
    )
  words = {
    "ends": "runs ended",
    "saved": "checkpoints saved",
    "updates_late": "updates after the signal at most",
    "refused": "starts refused in one line",
    "told": "damaged files told in one line",
  }
  seen = [f"{row[key]} {text}" for key, text in words.items() if key in row]
  return ", ".join(seen)
