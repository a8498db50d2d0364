"""Runs that are killed, stopped, starved and damaged end as if left alone.

    python -m tests.endurance --kills=50 --soak=100000 --processes=16

Each trainer (SOL, language models, Long Range Arena, regression language
models, recall) runs small, and what it ends with is compared bit by bit with an
undisturbed run: models, metrics without times, contents of checkpoints.

  kills         SIGKILL at random moments, as often as --kills says
  sigterm       SIGTERM at random moments: a checkpoint within an update
  disk_full     the disk of the run ends at random sizes, and is made larger
  read_only     the disk cannot be written for a while
  clock         the clock goes back by hours between starts, and within them
  half_written  files of a killed run are cut, or a bit of them is flipped
  soak          as many updates as --soak says: memory stays, nothing is
                compiled again

The disks are mounted in a namespace of this process (`unshare -rm`). It prints
a line a check, ends with 1 where there was a fault, and writes a JSON to
--result. Some two hours of a CPU core at the sizes above. Tests of scripts kill
two of the trainers once each.
"""

import argparse
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

from research.core import metrics
from research.results import files as result_files
from tests import endurance_runs, endurance_soak
from tests.endurance_runs import KILL, TERM, TRAINERS, Runs

_INSIDE = "FRUGAX_ENDURANCE_INSIDE"
_MB = 1 << 20
# An update under way when the signal comes is finished and saved; lines of
# metrics are written an update late.
_LATE = 3

Row = dict[str, Any]


def kills(runs: Runs, times: int, draw: random.Random) -> Row:
  """Kills runs `times` times in all, and lets each end."""
  return _killed(runs, times, draw, "kills", lambda workdir: None)


def half_written(runs: Runs, times: int, draw: random.Random) -> Row:
  """Kills runs, and damages a file that each has written last."""
  return _killed(
    *(runs, times, draw, "half_written"),
    lambda workdir: damage(workdir, draw),
  )


def _killed(runs, times, draw, name, between) -> Row:
  faults, ends, told, place = [], 0, 0, 0
  workdir, mend = runs.home / f"{name}_{place}", None
  for _ in range(times):
    code, err, _ = runs.stop(workdir, KILL, draw)
    if code == 2 and mend and endurance_runs.is_one_line(err):
      # A run passes over what is damaged, or says so in one line.
      told, mend = told + 1, mend()
    elif code == 0:
      faults += _end(runs, workdir)
      ends, place, mend = ends + 1, place + 1, None
      workdir = runs.home / f"{name}_{place}"
    elif code == -KILL:
      mend = mend or between(workdir)
    else:
      faults.append(f"exit {code}: {err[-300:]}")
  if mend:
    code, err = runs.run(workdir)
    if code == 2 and endurance_runs.is_one_line(err):
      told, mend = told + 1, mend()
  faults += _finish(runs, workdir)
  return _row(name, times, faults, ends=ends + 1, told=told)


def damage(
  workdir: pathlib.Path, draw: random.Random
) -> Callable[[], None] | None:
  """Cuts a file of the newest checkpoint, or of metrics, or flips a bit.

  Returns:
    What puts the file back, or None where there was none to damage.
  """
  files = []
  for folder in endurance_runs.checkpoints(workdir)[-1:]:
    files += [path for path in folder.rglob("*") if path.is_file()]
    log = folder.parents[1] / "metrics.jsonl"
    # Lines before a checkpoint are on the disk before it is.
    if metrics.read_jsonl(log)[-1]["step"] >= int(folder.name):
      files.append(log)
  files = [path for path in files if path.stat().st_size]
  if not files:
    return None
  path = draw.choice(sorted(files))
  before = path.read_bytes()
  at = draw.randrange(len(before))
  if path.name == "metrics.jsonl":
    # A log is appended to: a crash cuts its last line, and no other.
    cut = before[: before.rstrip(b"\n").rfind(b"\n") + 1]
    path.write_bytes(before[: draw.randint(len(cut), len(before))])
  elif draw.random() < 0.5:
    path.write_bytes(before[:at])
  else:
    flipped = bytes([before[at] ^ 1])
    path.write_bytes(before[:at] + flipped + before[at + 1 :])

  def mend():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(before)

  return mend


def sigterm(runs: Runs, times: int, draw: random.Random) -> Row:
  """Sends SIGTERM: exit 143 and a checkpoint of all that was done."""
  faults, saved, latest, place = [], 0, 0, 0
  workdir = runs.home / f"sigterm_{place}"
  for _ in range(times):
    before = endurance_runs.lines(workdir)
    code, err, there = runs.stop(workdir, TERM, draw)
    if code == 0:
      faults += _end(runs, workdir)
      place += 1
      workdir = runs.home / f"sigterm_{place}"
    elif code == 143 and "the same command goes on" in err:
      saved += 1
      late = endurance_runs.lines(workdir) - max(there, before)
      latest = max(latest, late)
      newest = endurance_runs.checkpoints(workdir)[-1]
      log = metrics.read_jsonl(newest.parents[1] / "metrics.jsonl")
      done = log[-1]["step"] + 1
      if late > _LATE or int(newest.name) != done:
        faults.append(f"{late} updates late, {newest.name} of {done} saved")
    elif code != -TERM:
      # Before and behind the updates SIGTERM ends a process as it always does.
      faults.append(f"exit {code}: {err[-300:]}")
  faults += _finish(runs, workdir)
  return _row("sigterm", times, faults, saved=saved, updates_late=latest)


def clock(runs: Runs, times: int, draw: random.Random) -> Row:
  """Starts with a clock that is behind, and goes back now and then."""
  front = runs.home / "clock"
  front.mkdir()
  (front / "sitecustomize.py").write_text(
    "import random, time\n"
    "draw, now, now_ns = random.Random(0), time.time, time.time_ns\n"
    "behind = draw.uniform(0, 1e6)\n"
    "def back():\n"
    "  global behind\n"
    "  behind += 3600 * (draw.random() < 0.1)\n"
    "  return behind\n"
    "time.time = lambda: now() - back()\n"
    "time.time_ns = lambda: now_ns() - int(1e9 * back())\n"
  )
  faults = []
  for place in range(times):
    workdir = runs.home / f"clock_{place}"
    runs.stop(workdir, KILL, draw)
    code, err = runs.run(workdir, str(front))
    faults += [f"exit {code}: {err[-300:]}"] if code else _end(runs, workdir)
  return _row("clock", times, faults)


def disk_full(runs: Runs, times: int, draw: random.Random) -> Row:
  """Ends the disk at random sizes below what a run takes."""
  faults, full = [], 0
  whole = _size(runs.home / "undisturbed")
  for place in range(times):
    disk = runs.home / f"full_{place}"
    disk.mkdir()
    size = int(whole * draw.uniform(0.02, 0.98))
    _mount(disk, f"size={size}")
    try:
      for _ in range(2):
        code, err = runs.run(disk / "run")
        if code == 0:
          break
        full += 1
        says = re.search("no space (is )?left", err, re.IGNORECASE)
        if code != 2 or not says or not endurance_runs.is_one_line(err):
          faults.append(f"exit {code} at {size} bytes: {err[-300:]}")
      _mount(disk, f"remount,size={8 * whole + 64 * _MB}")
      faults += _finish(runs, disk / "run")
    finally:
      subprocess.run(["umount", disk], check=True)
  return _row("disk_full", times, faults, refused=full)


def read_only(runs: Runs, times: int, draw: random.Random) -> Row:
  """Kills a run, and starts it where nothing can be written."""
  faults = []
  for place in range(times):
    disk = runs.home / f"read_only_{place}"
    disk.mkdir()
    _mount(disk, f"size={256 * _MB}")
    try:
      runs.stop(disk / "run", KILL, draw)
      _mount(disk, "remount,ro")
      code, err = runs.run(disk / "run")
      says = "Read-only" in err and endurance_runs.is_one_line(err)
      if code != 2 or not says:
        faults.append(f"exit {code}: {err[-300:]}")
      _mount(disk, "remount,rw")
      faults += _finish(runs, disk / "run")
    finally:
      subprocess.run(["umount", disk], check=True)
  return _row("read_only", times, faults)


def _mount(disk: pathlib.Path, options: str) -> None:
  command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
  subprocess.run(command, check=True, capture_output=True)


def _size(folder: pathlib.Path) -> int:
  return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _finish(runs: Runs, workdir: pathlib.Path) -> list[str]:
  """Faults of a run that is let to its end."""
  code, err = runs.run(workdir)
  return [f"exit {code}: {err[-300:]}"] if code else _end(runs, workdir)


def _end(runs: Runs, workdir: pathlib.Path) -> list[str]:
  """Faults of a run that has ended; its folder goes if there is none."""
  if differ := runs.differs(workdir):
    return [f"{workdir.name} ends differently in {', '.join(differ)}"]
  shutil.rmtree(workdir)
  return []


def _row(check: str, times: int, faults: list[str], **more: Any) -> Row:
  return {
    "check": check,
    "times": times,
    "faults": len(faults),
    **more,
    "first_faults": faults[:10],
  }


CHECKS = {
  "kills": kills,
  "sigterm": sigterm,
  "disk_full": disk_full,
  "read_only": read_only,
  "clock": clock,
  "half_written": half_written,
}
_ON_DISKS = {"disk_full", "read_only"}


def _undisturbed(name: str, folder: str) -> Runs:
  home = pathlib.Path(folder) / name
  home.mkdir()
  endurance_runs.prepare(home)
  return Runs(name, home)


def _tried(runs: Runs, trainer: str, check: str, times: int) -> Row:
  """The row of a trainer's check."""
  began = time.perf_counter()
  try:
    row = CHECKS[check](runs, times, random.Random(f"{trainer} {check}"))
  except Exception as error:
    # A check that fails is a fault, and no end of the others.
    row = _row(check, times, [f"{type(error).__name__}: {error}"[:2000]])
  seconds = time.perf_counter() - began
  return _shown({"check": check, "trainer": trainer, **row, "seconds": seconds})


def _shown(row: Row) -> Row:
  """Prints a row."""
  apart = ("check", "trainer", "first_faults")
  more = [f"{key} {value}" for key, value in row.items() if key not in apart]
  print(
    f"{row['check']} {row['trainer']}: {', '.join(more)}",
    *row["first_faults"],
    sep="\n  ",
    flush=True,
  )
  return row


def _enter_namespace() -> None:
  """Becomes this command where it may mount disks."""
  if _INSIDE not in os.environ:
    os.environ[_INSIDE] = "1"
    command = [sys.executable, "-m", "tests.endurance", *sys.argv[1:]]
    os.execvp("unshare", ["unshare", "-rm", *command])


def main() -> int:
  """Runs the command of this file's first comment."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=50, help="of each trainer")
  parser.add_argument("--times", type=int, default=10, help="of other checks")
  parser.add_argument("--soak", type=int, default=100_000, help="updates")
  parser.add_argument("--trainers", default=",".join(TRAINERS))
  parser.add_argument("--checks", default=",".join([*CHECKS, "soak"]))
  parser.add_argument("--processes", type=int, default=1, help="checks at once")
  parser.add_argument("--result", help="JSON file to write")
  options = parser.parse_args()
  checks = options.checks.split(",")
  if not _ON_DISKS.isdisjoint(checks):
    _enter_namespace()
  words = [word for word in sys.argv[1:] if not word.startswith("--result")]
  command = shlex.join(["python", "-m", "tests.endurance", *words])
  times = {
    name: options.kills if name == "kills" else options.times
    for name in checks
    if name != "soak"
  }
  began, rows = time.perf_counter(), []
  with (
    tempfile.TemporaryDirectory() as folder,
    futures.ThreadPoolExecutor(options.processes) as pool,
  ):
    tried = []
    if "soak" in checks:
      # The longest, and alone with what it trains.
      soak = lambda: _shown(endurance_soak.row(options.soak))
      tried.append(pool.submit(soak))
    names = options.trainers.split(",") if times else []
    for name, runs in zip(
      names, pool.map(lambda name: _undisturbed(name, folder), names)
    ):
      for check, count in times.items():
        tried.append(pool.submit(_tried, runs, name, check, count))
    for _ in futures.as_completed(tried):
      rows = [future.result() for future in tried if future.done()]
      complete = len(rows) == len(tried)
      seconds = time.perf_counter() - began
      if options.result:
        result_files.write_result(
          options.result, rows, command, seconds, complete=complete
        )
  return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
  sys.exit(main())
