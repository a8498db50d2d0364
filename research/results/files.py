"""Result files: what was run, on what, for how long, and the rows."""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from models import input_files
from models.errors import InputError
from research.core import files

_ROOT = Path(__file__).resolve().parents[2]
_NUMBERS = re.compile(r"\[\n\s+([-+.,\snule\d]+?)\n\s+\]")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def command() -> str:
  """Returns this run's command line as one would type it.

  Without --result: it is a place on one machine, and changes no number. Paths
  are as `without_places` leaves them, for the same reason.
  """
  script = Path(sys.argv[0]).resolve()
  if script.is_relative_to(_ROOT):
    script = script.relative_to(_ROOT)
  kept = [word for word in sys.argv[1:] if not word.startswith("--result=")]
  return shlex.join(["python", str(script), *map(without_places, kept)])


def without_places(text: str) -> str:
  """Returns a path, or a flag of paths, without places of one machine.

  An absolute path in the current folder becomes relative to it, and of another
  one the name is left.

  Args:
    text: One path, several with commas between, or --flag= with these.
  """
  flag, equal, paths = text.rpartition("=")
  return flag + equal + ",".join(map(_without_place, paths.split(",")))


def _without_place(text: str) -> str:
  path = Path(text)
  if not text.startswith("/") or not path.name:
    return text
  if path.is_relative_to(Path.cwd()):
    return str(path.relative_to(Path.cwd()))
  return path.name


def _git(*arguments: str) -> str | None:
  try:
    done = subprocess.run(
      ["git", *arguments], cwd=_ROOT, capture_output=True, text=True
    )
  except OSError:
    return None
  return None if done.returncode else done.stdout.strip()


def commit() -> str | None:
  """Returns the commit that runs, "+dirty" when tracked files differ from it.

  Result files do not count as a difference. Where the code was copied without
  its history, or onto another one, `FRUGAX_COMMIT` names the commit; None when
  nothing does.
  """
  named = os.environ.get("FRUGAX_COMMIT")
  head = _git("rev-parse", "HEAD")
  if named or head is None:
    return named
  changed = _git(
    "status",
    "--porcelain",
    "--untracked-files=no",
    "--",
    ".",
    ":!experiments/results",
  )
  return f"{head}+dirty" if changed else head


def device() -> str:
  """Returns kind and count of the devices, as "NVIDIA H200 x1"."""
  import jax  # here, so that a mistyped flag is answered without waiting

  devices = jax.devices()
  return f"{devices[0].device_kind} x{len(devices)}"


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the packages that matter."""
  found = {name: metadata.version(name) for name in _PACKAGES}
  return {"python": platform.python_version(), **found}


def _plain(value: Any) -> Any:
  """Turns numpy and jax values into JSON's; what is not finite becomes null."""
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def of_run(folder: Path, script: str) -> tuple[Path, dict[str, Any]]:
  """The file that a finished run wrote to its folder, and what it holds.

  Args:
    folder: workdir of the run.
    script: that trains there, for people.

  Raises:
    InputError: the run is not finished, or the file is damaged.
  """
  path = folder / "result.json"
  if not path.exists():
    raise InputError(
      f"{folder}: holds no result.json: train there to the end first with "
      f"{script}"
    )
  return path, input_files.read_json(path)


def write_result(
  path: str | os.PathLike[str],
  rows: Sequence[Mapping[str, Any]],
  command: str,
  seconds: float,
  **more: Any,
) -> None:
  """Writes a result JSON; a reader sees the old file or the new, never half.

  Args:
    path: The file; its folder is made.
    rows: One flat mapping a row; arrays become lists, NaN and inf null. A list
      of numbers takes one line. A path in `data` is as `without_places` has it.
    command: The command line, see `command()`.
    seconds: Wall-clock seconds of the run.
    **more: Further top-level keys.
  """
  result = {
    "command": command,
    "commit": commit(),
    "device": device(),
    "versions": versions(),
    "seconds": round(seconds, 3),
    **more,
    "rows": list(rows),
  }
  write(path, result)


def write(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
  """Writes what a result file holds, see `write_result`."""
  rows = [
    {**row, "data": without_places(row["data"])}
    if isinstance(row.get("data"), str)
    else row
    for row in result["rows"]
  ]
  whole = _plain({**result, "rows": rows})
  text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
  text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
  files.write_text(path, text)
