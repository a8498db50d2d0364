"""Measures many programs with many processes; interrupted, it goes on.

Programs are cut into chunks of consecutive indices. A chunk that is done is one
file of the folder, written whole or not at all, so that a run that was killed
loses the chunks it was at and nothing else. A program that takes too long, or
takes its process with it, is left out with the reason, and the process is
started anew.
"""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import time
from collections.abc import Iterator
from multiprocessing import connection
from typing import Any

from models import input_files
from models.errors import InputError
from research.core import files
from research.core import workdir as workdir_lib
from research.core.progress import Progress
from research.program_metrics import worker
from research.program_metrics.measure import Timing

Row = dict[str, Any]
# Programs of a chunk.
CHUNK = 16
# Seconds that a process may take to start, and processes without one program.
_START_SECONDS, _MOST_STARTS = 300.0, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is measured.

  Attributes:
    seed: of the programs.
    count: programs, from index 0 on; whole chunks of `CHUNK` are measured.
    workers: processes; on a CPU each is bound to a core of its own.
    limit: seconds that one program may take to compile or to be timed.
    timing: how latency is measured.
    only: of these indices alone; None takes all.
    seconds: after so many no chunk is begun, and the set is the programs before
      that; None measures all.
  """

  seed: int
  count: int
  workers: int
  limit: float = 30.0
  timing: Timing = dataclasses.field(default_factory=Timing)
  only: tuple[int, ...] | None = None
  seconds: float | None = None

  def chunks(self) -> list[list[int]]:
    """Indices by chunk; more programs leave chunks as they were."""
    whole = -(-self.count // CHUNK) * CHUNK
    indices = range(whole) if self.only is None else self.only
    by_chunk = collections.defaultdict(list)
    for index in indices:
      by_chunk[index // CHUNK].append(index)
    return list(by_chunk.values())


class _Process:
  """A worker, what it does, and since when."""

  def __init__(self, plan: Plan, core: int | None):
    self.core = core
    context = multiprocessing.get_context("spawn")
    self.pipe, other = context.Pipe()
    self._process = context.Process(
      target=worker.run, args=(other, core, plan.seed, plan.timing), daemon=True
    )
    self._process.start()
    other.close()
    self.is_ready = False
    self.chunk: list[int] = []
    self.failed: list[Row] = []
    self.program: int | None = None
    self.since = time.monotonic()

  def give(self, chunk: list[int], failed: list[Row]) -> None:
    self.chunk, self.failed = chunk, failed
    self.program, self.since = None, time.monotonic()
    gone = {row["index"] for row in failed}
    self.pipe.send([index for index in chunk if index not in gone])

  def stop(self) -> None:
    self._process.kill()
    self._process.join()
    self.pipe.close()


def collect(
  plan: Plan, folder: pathlib.Path, label: str = "measure"
) -> list[Row]:
  """Measures what the folder does not hold yet, and reads all.

  Args:
    plan: what is measured.
    folder: of the chunks' files; keeps to one machine.
    label: of the progress bar.

  Returns:
    Rows in the order of their index, with what machine they are of; failed
    programs have "failure" in the place of numbers. Where time ran out it is
    those before the first chunk that is missing.

  Raises:
    InputError: a file is damaged, the folder was begun on another machine, or
      processes cannot be started.
  """
  chunks = plan.chunks()
  left = collections.deque(c for c in chunks if not _path(folder, c).exists())
  total = sum(map(len, chunks))
  done = total - sum(map(len, left))
  failures = 0
  bar = Progress(total, done, label)
  processes: list[_Process] = []
  try:
    cores = _cores(plan.workers)
    for core in cores[: len(left)]:
      processes.append(_Process(plan, core))
    for process, rows in _serve(plan, processes, left, folder):
      rows = sorted(rows, key=lambda row: row["index"])
      files.write_json(_path(folder, process.chunk), rows)
      done += len(rows)
      failures += sum("failure" in row for row in rows)
      bar.update(done, {"failed": failures})
  finally:
    bar.close()
    for process in processes:
      process.stop()
  paths = itertools.takewhile(
    pathlib.Path.exists, (_path(folder, chunk) for chunk in chunks)
  )
  return [row for path in paths for row in _read(path)]


def _serve(
  plan, processes, left, folder
) -> Iterator[tuple[_Process, list[Row]]]:
  """Yields a process and the rows of its chunk, until all is done."""
  starts, began = 0, time.monotonic()
  while any(p.chunk for p in processes) or left:
    if plan.seconds is not None and time.monotonic() - began > plan.seconds:
      left.clear()
    waiting = {process.pipe: process for process in processes}
    ready = connection.wait(list(waiting), timeout=min(1.0, plan.limit))
    for pipe in ready:
      process = waiting[pipe]
      try:
        word, value = pipe.recv()
      except (EOFError, OSError):
        starts = starts + 1 if process.program is None else 0
        if starts > _MOST_STARTS:
          raise InputError(
            "processes end before they measure anything: run one program by "
            "hand to see why, or take fewer --workers"
          ) from None
        _replace(plan, processes, process, "the process ended")
        continue
      if word == worker.HEADER:
        if value["backend"] != "cpu" and plan.workers > 1:
          raise InputError(
            f"--workers={plan.workers}: a {value['backend']} is measured by "
            "one process at a time: take 1, or set JAX_PLATFORMS=cpu"
          )
        workdir_lib.claim(folder, value)
        process.is_ready = True
        if process.chunk:
          process.give(process.chunk, process.failed)
        elif left:
          process.give(left.popleft(), [])
      elif word == worker.BEGIN:
        process.program, process.since = value, time.monotonic()
      else:
        yield process, value + process.failed
        process.chunk = []
        if left:
          process.give(left.popleft(), [])
    for process in list(processes):
      if process.is_ready and not process.chunk:
        continue
      limit = _START_SECONDS if process.program is None else plan.limit
      if time.monotonic() - process.since > limit:
        _replace(plan, processes, process, f"took more than {limit:g} s")


def _replace(plan: Plan, processes: list, process: _Process, why: str) -> None:
  """Starts a process anew; the program that it was at has failed."""
  process.stop()
  fresh = _Process(plan, process.core)
  fresh.chunk, fresh.failed = process.chunk, list(process.failed)
  if process.program is not None:
    fresh.failed.append({"index": process.program, "failure": why})
  processes[processes.index(process)] = fresh


def _cores(workers: int) -> list[int | None]:
  """Cores to bind processes to; none where that is not possible.

  Raises:
    InputError: there are fewer cores than processes.
  """
  if not hasattr(os, "sched_getaffinity"):
    return [None] * workers
  cores = sorted(os.sched_getaffinity(0))
  if workers > len(cores):
    raise InputError(
      f"--workers={workers}, but {len(cores)} cores are here: each needs its "
      "own, or times mean nothing"
    )
  # Workers take the last cores, because everything else runs on the first.
  return cores[len(cores) - workers :]


def _path(folder: pathlib.Path, chunk: list[int]) -> pathlib.Path:
  return folder / f"{chunk[0] // CHUNK:06d}.json"


def _read(path: pathlib.Path) -> list[Row]:
  return input_files.read_kept(path, list)
