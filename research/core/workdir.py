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
from typing import Any, TextIO

from models.errors import InputError
from research.core import files

_LOCK = ".lock"
_NEW_WORKDIR = "give the same flags, or another --workdir"


def claim(workdir: str | os.PathLike[str], flags: Mapping[str, Any]) -> None:
  """Takes a folder for this process until it ends, and for these flags.

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
  workdir = pathlib.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / _LOCK).open("a") as stream:
      place = os.fstat(stream.fileno())
    _lock(workdir.resolve(), place.st_dev, place.st_ino)
    _check_flags(workdir, json.loads(json.dumps(dict(flags))))
    files.remove_drafts(workdir)
  except OSError as error:
    raise InputError(f"--workdir {workdir}: {error.strerror}") from error


# A lock lasts as long as its file is open, and so as long as the process. By
# the number of the file, because a folder may be removed and made again.
@functools.cache
def _lock(workdir: pathlib.Path, device: int, inode: int) -> TextIO:
  """The locked file of a folder."""
  stream = (workdir / _LOCK).open("a+")
  try:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    stream.seek(0)
    holder = stream.read().strip() or "another process"
    stream.close()
    raise InputError(
      f"{workdir} is in use by {holder}: wait for it, end it, or give another"
      " --workdir"
    ) from error
  except OSError as error:
    print(
      f"warning: {workdir} cannot be locked ({error.strerror}): let no second"
      " process use it",
      file=sys.stderr,
    )
    return stream
  stream.truncate(0)
  since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
  stream.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
  stream.flush()
  return stream


def _check_flags(workdir: pathlib.Path, flags: dict[str, Any]) -> None:
  """Writes `flags.json`, or checks that it holds the same."""
  path = workdir / "flags.json"
  if not path.exists():
    for name in ("metrics.jsonl", "checkpoints"):
      if (workdir / name).exists():
        raise InputError(
          f"{workdir} holds {name} but no flags.json: give another --workdir"
        )
    files.write_json(path, flags)
    return
  try:
    before = json.loads(path.read_text())
    names = sorted(before.keys() | flags.keys())
  except (ValueError, AttributeError) as error:
    raise InputError(f"{path} is damaged: {_NEW_WORKDIR}") from error
  for name in names:
    now, then = flags.get(name), before.get(name)
    if now != then:
      raise InputError(
        f"--{name} is {now!r} but {workdir} was started with {then!r}:"
        f" {_NEW_WORKDIR}"
      )
