"""Result files of long runs, written row by row."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from research.results import files


def record_rows(
  make: Callable[[Callable[[str], None]], Iterable[Mapping[str, Any]]],
  path: str | None,
  began: float,
) -> None:
  """Makes rows, and writes them anew after every one, `complete` at the end.

  Args:
    make: Takes what prints a line, and yields rows. Lines that say what was
      left out stand in the result too.
    path: The result JSON, or None to write none.
    began: `time.perf_counter()` at the start of the run.
  """
  rows, notes = [], []

  def say(line: str) -> None:
    print(line, flush=True)
    if "left out" in line:
      notes.append(line)

  def keep(complete: bool) -> None:
    if path:
      seconds = time.perf_counter() - began
      more = {"left_out": notes, "complete": complete}
      files.write_result(path, rows, files.command(), seconds, **more)

  for row in make(say):
    rows.append(row)
    keep(complete=False)
  keep(complete=True)
