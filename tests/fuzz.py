"""Readers against mutated files: clean errors only, bounded time and memory.

    python -m tests.fuzz --mutations=100000 --formats=gguf,safetensors

mutates small valid files of each format (bits flipped, ends cut, parts spliced,
lengths replaced, brackets nested deep) and gives them to the reader in child
processes. It prints a line a format: how many were read, how many refused by
InputError, and every traceback, hang (over ten seconds) and use of memory
beyond 16 times the file and 64 MB, with the seed that makes it again. It ends
with 1 where there was one, and writes a JSON of all formats to --result, which
an interrupted run goes on from. A mutation takes .2 to 4 ms, so that all
formats take a CPU core more than an hour, if TMPDIR is in memory (/dev/shm).
The suite runs 8 to 100 a format.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import re
import shlex
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from models.errors import InputError
from research.results import files as result_files

SECONDS = 10
# Mutations of a format that a child process tries.
_BATCH = 25_000
_RATIO, _ROOM = 16, 64 << 20
_SIZES = (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
# The long ones show where time grows faster than the file.
_LONG = 20_000
_TEXTS = (
  b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'"\\ud800"', b"9" * 400,
  b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\x00", b"true",
  b"9" * _LONG, b"a" * _LONG, b" " * _LONG, b"," * _LONG, b'"' * _LONG,
  b"[" * _LONG, b"\n" * _LONG, b"a, " * _LONG,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Format:
  """A reader and a file that it reads.

  Attributes:
    make: writes the files of an example into an empty folder.
    target: the one to mutate.
    read: reads the folder; may raise InputError.
  """

  make: Callable[[pathlib.Path], None]
  target: str
  read: Callable[[pathlib.Path], object]


def mutate(data: bytes, seed: int) -> bytes:
  """One to three mutations of a file, always the same for a seed."""
  draw = random.Random(seed)
  found = bytearray(data)
  for _ in range(draw.choice((1, 1, 2, 3))):
    at = draw.randrange(len(found) + 1)
    kind = draw.randrange(7)
    if kind == 0 and found:
      found[at % len(found)] ^= 1 << draw.randrange(8)
    elif kind == 1:
      del found[at:]
    elif kind == 2:
      size = struct.pack("<Q", draw.choice(_SIZES))
      width = draw.choice((1, 4, 8))
      found[at : at + width] = size[:width]
    elif kind == 3:
      found[at:at] = draw.choice(_TEXTS)
    elif kind == 4:
      end = at + draw.randrange(1, 64)
      found[at:at] = found[draw.randrange(len(found) + 1) :][:64]
      del found[end : end + draw.randrange(64)]
    elif kind == 5:
      del found[at : at + draw.randrange(1, 9)]
    else:
      _replace_value(found, draw)
  return bytes(found)


def _replace_value(found: bytearray, draw: random.Random) -> None:
  """Puts another value behind one of the colons or commas of JSON and CSV."""
  places = [i for i, byte in enumerate(found) if byte in b":,"]
  if not places:
    return
  start = draw.choice(places) + 1
  ends = [found.find(end, start) for end in (b",", b"}", b"\n")]
  end = min((end for end in ends if end >= 0), default=len(found))
  found[start:end] = draw.choice(_TEXTS)


@dataclasses.dataclass(kw_only=True)
class Outcome:
  """What a reader did with some mutations.

  Attributes:
    refused: mutations that it refused by InputError.
    most_bytes: memory that one of them took.
    seconds: of the CPU, that all took.
    most_seconds: that one of them took.
    faults: seeds of those that it failed on, and how.
  """

  refused: int = 0
  most_bytes: int = 0
  seconds: float = 0.0
  most_seconds: float = 0.0
  faults: list[tuple[int, str]] = dataclasses.field(default_factory=list)

  def add(self, other: "Outcome") -> None:
    """Takes in what the reader did with other mutations."""
    self.refused += other.refused
    self.most_bytes = max(self.most_bytes, other.most_bytes)
    self.seconds += other.seconds
    self.most_seconds = max(self.most_seconds, other.most_seconds)
    self.faults += other.faults


def _attempt(
  form: Format, folder: pathlib.Path, data: bytes, seed: int, told: Outcome
) -> str | None:
  """Reads one mutation; None for a reader that behaves, else what it did."""
  mutated = mutate(data, seed)
  (folder / form.target).write_bytes(mutated)
  before = _memory(anew=True)
  began = time.process_time()
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  fault = None
  try:
    form.read(folder)
  except InputError as error:
    told.refused += 1
    line = str(error)
    if "\n" in line or len(line) > 1000:
      fault = f"a message of {len(line)} characters"
  except BaseException as error:
    places = traceback.extract_tb(error.__traceback__)
    fault = f"{type(error).__name__} at {places[-1].name} of {places[-1].line}"
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  told.most_seconds = max(told.most_seconds, time.process_time() - began)
  used = _memory() - before
  told.most_bytes = max(told.most_bytes, used)
  if fault is None and used > _RATIO * len(mutated) + _ROOM:
    fault = f"{used >> 20} MB for a file of {len(mutated)} bytes"
  return fault


def _memory(anew: bool = False) -> int:
  """The most bytes that the process held, since it was asked for anew."""
  if anew:
    # The kernel forgets the peak of before, which importing JAX has set high.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


class _HangError(BaseException):
  """A reader took too long; no reader may take this for a damaged file."""


def _hang(*_):
  raise _HangError(f"over {SECONDS} seconds")


def outcome(form: Format, seeds: Iterator[int] | range) -> Outcome:
  """What a reader does with the mutations of some seeds."""
  before = signal.signal(signal.SIGALRM, _hang)
  found = Outcome()
  try:
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      form.make(folder)
      data = (folder / form.target).read_bytes()
      form.read(folder)
      began = time.process_time()
      for seed in seeds:
        if fault := _attempt(form, folder, data, seed, found):
          found.faults.append((seed, fault))
      found.seconds = time.process_time() - began
  finally:
    signal.signal(signal.SIGALRM, before)
  return found


def _child(name: str, first: int, count: int, at, pipe) -> None:
  from tests import fuzz_formats

  # Libraries in Rust write about each failed check by themselves.
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  seeds = _told(range(first, first + count), at)
  pipe.send(outcome(fuzz_formats.FORMATS[name], seeds))


def _told(seeds: range, at) -> Iterator[int]:
  for seed in seeds:
    at.value = seed
    yield seed


def run(name: str, seeds: range) -> Outcome:
  """A reader's outcome; a child that dies or hangs outside of Python fails."""
  context, whole = multiprocessing.get_context("spawn"), Outcome()
  first, end = seeds.start, seeds.stop
  while first < end:
    count = end - first
    ours, theirs = context.Pipe(duplex=False)
    at = context.RawValue("q", -1)
    child = context.Process(
      target=_child, args=(name, first, count, at, theirs)
    )
    child.start()
    theirs.close()
    before, after = None, first + count
    try:
      while not ours.poll(6 * SECONDS):
        if at.value == before:
          raise EOFError
        before = at.value
      whole.add(ours.recv())
    except EOFError:
      child.kill()
      seed = max(at.value, first)
      whole.faults.append((seed, "the process hangs or died"))
      after = seed + 1
    child.join()
    first = after
  return whole


def _row(name: str, mutations: int, found: Outcome) -> dict[str, Any]:
  """A row of the result."""
  return {
    "format": name,
    "commit": result_files.commit(),
    "mutations": mutations,
    "refused": found.refused,
    "faults": len(found.faults),
    "most_mb": found.most_bytes / 1e6,
    "ms": 1e3 * found.seconds / mutations,
    "slowest_ms": 1e3 * found.most_seconds,
    "first_faults": [f"seed {s}: {what}" for s, what in found.faults[:20]],
  }


def _kept(path: str | None, mutations: int) -> dict[str, dict[str, Any]]:
  """Rows of an earlier run by format: of those that need no other try.

  These are the formats without a fault in as many mutations, unless the run had
  tried all formats and found none.
  """
  if not path or not os.path.exists(path):
    return {}
  with open(path) as file:
    found = json.load(file)
  good = [
    row
    for row in found["rows"]
    if row["mutations"] == mutations and not row["faults"]
  ]
  if found["complete"] and good == found["rows"]:
    return {}
  return {row["format"]: {"commit": found["commit"]} | row for row in good}


def _line(row: dict[str, Any]) -> str:
  """What is printed of a row."""
  told = (
    f"{row['format']}: {row['mutations']} mutations, {row['refused']} refused, "
    f"{row['faults']} faults, {row['most_mb']:.0f} MB at most, "
    f"{row['ms']:.2f} ms each, {row['slowest_ms']:.0f} the slowest"
  )
  return "\n  ".join([told, *row["first_faults"]])


def main() -> int:
  """Runs the command of this file's first comment."""
  from tests import fuzz_formats

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--mutations", type=int, default=100_000)
  parser.add_argument("--formats", default=",".join(fuzz_formats.FORMATS))
  parser.add_argument(
    "--processes", type=int, default=1, help="children at once"
  )
  parser.add_argument("--result", help="JSON file to write")
  options = parser.parse_args()
  words = [word for word in sys.argv[1:] if not word.startswith("--result")]
  command = shlex.join(["python", "-m", "tests.fuzz", *words])
  names, mutations = options.formats.split(","), options.mutations
  kept = _kept(options.result, mutations)
  rows, began = [], time.perf_counter()
  with futures.ThreadPoolExecutor(options.processes) as pool:
    # The mutations of one format go to several children, since a format that
    # takes six times as long as the others would else be alone at the end.
    tried = {
      name: [
        pool.submit(run, name, range(first, min(first + _BATCH, mutations)))
        for first in range(0, mutations, _BATCH)
      ]
      for name in names
      if name not in kept
    }
    for name in names:
      if name not in kept:
        found = Outcome()
        for part in tried[name]:
          found.add(part.result())
        kept[name] = _row(name, mutations, found)
      rows.append(kept[name])
      print(_line(kept[name]), flush=True)
      if options.result:
        seconds = time.perf_counter() - began
        complete = len(rows) == len(names)
        result_files.write_result(
          options.result, rows, command, seconds, complete=complete
        )
  return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
  sys.exit(main())
