"""Result files of long runs, written row by row."""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from research.results import files


class Record:
  """What a run prints, leaves out and finds; written anew after every row."""

  def __init__(self, path: str | None, began: float):
    """Takes a path, or None, and `time.perf_counter()` at the start."""
    self._path, self._began = path, began
    self._rows, self._notes = [], []

  def say(self, line: str) -> None:
    """Prints a line."""
    print(line, flush=True)

  def note(self, line: str) -> None:
    """Prints a line that says what was left out; the result keeps it."""
    self._notes.append(line)
    self.say(line)

  def rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Keeps rows as they come, `complete` after the last; returns them."""
    for row in rows:
      self._rows.append(row)
      self._keep(complete=False)
    self._keep(complete=True)
    return self._rows

  def keep(self, rows: Iterable[Mapping[str, Any]], *, complete: bool) -> None:
    """Keeps rows in the place of those before, as of work in no order."""
    self._rows = list(rows)
    self._keep(complete)

  def _keep(self, complete: bool) -> None:
    if self._path:
      files.write_result(
        self._path,
        self._rows,
        files.command(),
        time.perf_counter() - self._began,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        left_out=self._notes,
        complete=complete,
      )
