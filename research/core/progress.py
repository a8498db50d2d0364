"""Progress of long work on stderr, for a terminal and for a log file."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import tqdm


class Progress:
  """A bar on a terminal, and a plain line now and then elsewhere.

  Args:
    total: steps of the whole work.
    initial: steps done before (by a run that is going on).
    label: what the work is, in a word or two.
    enabled: False shows nothing.
    seconds_between_lines: how often a line is printed where there is no
      terminal.
  """

  def __init__(
    self,
    total: int,
    initial: int = 0,
    label: str = "train",
    enabled: bool = True,
    seconds_between_lines: float = 10.0,
  ):
    self._total = total
    self._initial = initial
    self._label = label
    self._enabled = enabled
    self._pause = seconds_between_lines
    self._start = self._last_line = time.monotonic()
    self._bar = None
    if enabled and sys.stderr.isatty():
      # On a terminal that does not know its size tqdm alone shows nothing.
      size = shutil.get_terminal_size()
      self._bar = tqdm.tqdm(
        total=total,
        initial=initial,
        desc=label,
        ncols=size.columns,
        nrows=size.lines,
      )

  def update(self, done: int, shown: Mapping[str, Any] | None = None) -> None:
    """Says that `done` steps of the total are done, with numbers to show."""
    numbers = {name: f"{float(v):.4g}" for name, v in (shown or {}).items()}
    if self._bar is not None:
      self._bar.set_postfix(numbers, refresh=False)
      self._bar.update(done - self._bar.n)
      return
    now = time.monotonic()
    due = now - self._last_line >= self._pause or done == self._total
    if self._enabled and due and done > self._initial:
      self._last_line = now
      per_step = (now - self._start) / (done - self._initial)
      left = tqdm.tqdm.format_interval(per_step * (self._total - done))
      words = [f"{name} {text}" for name, text in numbers.items()]
      words = [f"{done}/{self._total}", *words, f"{left} left"]
      print(f"{self._label}: " + "  ".join(words), file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar; later messages begin on a line of their own."""
    if self._bar is not None:
      self._bar.close()


def counter(
  label: str, total: int, enabled: bool = True
) -> Callable[[int], None]:
  """A bar that is told how much more is done; it closes at `total`."""
  bar = Progress(total, label=label, enabled=enabled)
  done = 0

  def advance(more: int) -> None:
    nonlocal done
    done += more
    bar.update(done)
    if done >= total:
      bar.close()

  return advance
