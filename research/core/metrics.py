"""Numbers of a run: JSON values and the metric log."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from models import input_files
from models.errors import InputError
from research.core import files

TIMING_SUFFIXES = ("_seconds", "_per_second", "mfu")
_FILE = "metrics.jsonl"
_FLUSH_SECONDS = 30.0


def to_json_value(value: Any) -> Any:
  """Python value of an array or number; NaN and infinities become None."""
  if isinstance(value, Mapping):
    return {str(name): to_json_value(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json_value(item) for item in value]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return to_json_value(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read_jsonl(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Lines of a JSONL file as dicts; [] when there is no such file.

  Raises:
    InputError: a line is no JSON object; names the file and the line.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = input_files.read_bytes(path).splitlines()
  rows = [_parse_line(line) for line in lines]
  if None in rows:
    raise InputError(
      f"{path} line {rows.index(None) + 1} is not a JSON object:"
      " mend or remove that line"
    )
  return rows


def sync(workdir: str | pathlib.Path) -> None:
  """Waits until the lines of a run that were written are on the disk.

  A checkpoint that outlives a crash of the machine must not be ahead of them: a
  run that goes on from it writes none of the lines before it.

  Raises:
    OSError: the disk is full; names the file.
  """
  path = pathlib.Path(workdir) / _FILE
  if path.exists():
    with files.errors_name(path), path.open("rb") as stream:
      os.fsync(stream.fileno())


def without_timing(row: Mapping[str, Any]) -> dict[str, Any]:
  """A line of metrics without the keys that differ from run to run.

  Timing is kept under keys that end in one of `TIMING_SUFFIXES`; all other keys
  are the same in a resumed run and in an undisturbed one.
  """
  return {k: v for k, v in row.items() if not k.endswith(TIMING_SUFFIXES)}


class MetricsLog:
  """Writes `metrics.jsonl` and TensorBoard events of a run.

  On opening, lines of steps >= `first_step` are dropped, and a line that a kill
  cut in two: the run writes them again.

  Args:
    workdir: folder of the run.
    first_step: the step the run starts or goes on from.
  """

  def __init__(self, workdir: str | pathlib.Path, first_step: int):
    # tensorboardX takes most of a second to import; only runs need it.
    from tensorboardX import event_file_writer, proto

    self._proto = proto
    self._path = pathlib.Path(workdir) / _FILE
    if self._path.exists():
      _truncate(self._path, first_step)
    folder = self._path.parent / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    self._stream = self._path.open("a")
    # Not `SummaryWriter`, whose thread hangs where a disk is full. The writer
    # names its file by the second: a run started again at once would write over
    # the events before it.
    self._events = event_file_writer.EventsWriter(
      str(folder / "events"), f".{time.time_ns()}"
    )
    self._flushed = time.monotonic()
    start = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
    self._add_event(first_step, session_log=start)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line; scalars go to TensorBoard too.

    Args:
      step: number of updates done before the one that `metrics` tells of.
      metrics: name -> number or array; non-finite numbers are written as null.

    Raises:
      OSError: the disk is full; names the file.
    """
    row = to_json_value({"step": step, **metrics})
    summary = self._proto.summary_pb2.Summary(
      value=[
        self._proto.summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step"
      ]
    )
    with files.errors_name(self._path):
      self._stream.write(json.dumps(row) + "\n")
      self._stream.flush()
      self._add_event(step, summary=summary)
      if time.monotonic() - self._flushed > _FLUSH_SECONDS:
        self._events.flush()
        self._flushed = time.monotonic()

  def close(self) -> None:
    """Flushes and closes both files.

    Raises:
      OSError: the disk is full; names the file.
    """
    with files.errors_name(self._path):
      self._stream.close()
      self._events.close()

  def _add_event(self, step: int, **what: Any) -> None:
    event = self._proto.event_pb2.Event(
      step=step, wall_time=time.time(), **what
    )
    self._events.write_event(event)


def _parse_line(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) else None


def _truncate(path: pathlib.Path, first_step: int) -> None:
  """Keeps, byte for byte, the lines of steps before `first_step`."""
  lines = input_files.read_bytes(path).splitlines(keepends=True)
  kept = [
    line
    for line in lines
    if line.endswith(b"\n") and _step(line, first_step) < first_step
  ]
  if kept != lines:
    files.write_bytes(path, b"".join(kept))


def _step(line: bytes, otherwise: int) -> int:
  step = (_parse_line(line) or {}).get("step")
  return step if isinstance(step, int) else otherwise
