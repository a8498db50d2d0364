"""Folders of runs: one process at a time, and always the same flags."""

import fcntl
import functools
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from models import input_files
from models.errors import InputError, shown
from research.core import files, processes

_LOCK = ".lock"
FLAGS = "flags.json"
_NEW_WORKDIR = "give the same flags, or another --workdir"


def claim(workdir: str | os.PathLike[str], flags: Mapping[str, Any]) -> None:
  """Takes a folder for this process until it ends, and for these flags.

  Where several processes make a run, the one that writes takes it for all.

  The folder is made if it is absent. The first claim writes `flags.json`, and
  all others check that they are the same. A claim clears away what a killed
  process left half written. The kernel frees the folder when the process ends,
  however it ends; the same process may claim it again.

  Args:
    workdir: of the run.
    flags: what decides its numbers, as JSON values.

  Raises:
    InputError: another process holds it, it is of other flags, or it cannot be
      used.
  """
  processes.from_writer(lambda: _claim(pathlib.Path(workdir), flags))


def _claim(workdir: pathlib.Path, flags: Mapping[str, Any]) -> None:
  flags = json.loads(json.dumps(dict(flags)))
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # Before anything is written: who errs leaves the folder as it is.
    _check_flags(workdir, flags)
    with (workdir / _LOCK).open("a") as stream:
      place = os.fstat(stream.fileno())
    _lock(workdir.resolve(), place.st_dev, place.st_ino)
    _check_flags(workdir, flags)
    if not (workdir / FLAGS).exists():
      files.write_json(workdir / FLAGS, flags)
    files.remove_drafts(workdir)
  except OSError as error:
    raise InputError(f"--workdir {workdir}: {error.strerror}") from error


# A lock lasts as long as its file is open, and so as long as the process. The
# number of the file tells a folder from one that was made anew in its place.
@functools.cache
def _lock(workdir: pathlib.Path, device: int, inode: int) -> int:
  """The descriptor of the locked file of a folder."""
  lock = os.open(workdir / _LOCK, os.O_RDWR)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    holder = os.read(lock, 1000).decode(errors="replace")
    os.close(lock)
    raise InputError(
      f"{workdir} is in use by {holder or 'another process'}: wait for it, end "
      "it, or give another --workdir"
    ) from error
  except OSError as error:
    print(
      f"warning: {workdir} cannot be locked ({error.strerror}): let no second"
      " process use it",
      file=sys.stderr,
    )
    return lock
  since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
  words = f"process {os.getpid()} on {socket.gethostname()} since {since}"
  os.truncate(lock, 0)
  os.write(lock, words.encode())
  return lock


def _check_flags(workdir: pathlib.Path, flags: dict[str, Any]) -> None:
  """Checks that `flags.json` holds the same, or that the folder is new."""
  path = workdir / FLAGS
  if not path.exists():
    for name in ("metrics.jsonl", "checkpoints"):
      if (workdir / name).exists():
        raise InputError(
          f"{workdir} holds {name} but no {FLAGS}: give another --workdir"
        )
    return
  before = input_files.read_kept(path, advice=_NEW_WORKDIR)
  for name in sorted(before.keys() | flags.keys()):
    now, then = flags.get(name), before.get(name)
    if now != then:
      if isinstance(now, dict) and isinstance(then, dict):
        parts = [k for k in {**then, **now} if now.get(k) != then.get(k)]
        now, then = ({k: x.get(k) for k in parts} for x in (now, then))
      raise InputError(
        f"--{name} is {shown(now, 200)} but {workdir} was started with"
        f" {shown(then, 200)}: {_NEW_WORKDIR}"
      )
