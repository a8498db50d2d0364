"""What every script shares: flags, one-line errors, and result files."""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

# Python looks in experiments/ first, and not in the checkout around it: so
# `ops`, `models` and `research` are found without an installation.
sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from flag_kinds import choice as choice
from flag_kinds import integer as integer
from flag_kinds import integers as integers
from flag_kinds import number as number
from flag_kinds import numbers as numbers
from flag_kinds import parsed
from models import input_files
from models.errors import InputError, advice_on
from models.locate import check_there as check_there
from research.results.files import command as command
from research.results.files import write_result as write_result

# --help lists the flags of the script, and of this module's the one of all.
flags.disclaim_key_flags()

_MOST_UNPACKED = integer(
  "most_unpacked_mb",
  None,
  "MB that a packed file may unpack to; by default 16 times its size and 32",
  lower=1,
)
flags.FLAGS.register_key_flag_for_module(
  sys.argv[0], flags.FLAGS[_MOST_UNPACKED.name]
)


def say(line: str) -> None:
  """Prints a line at once, also into a file or a pipe."""
  print(line, flush=True)


def show(
  lines: Sequence[Mapping[str, Any]],
  columns: Mapping[str, str] | Sequence[str] | None = None,
) -> None:
  """Prints a table of `report.markdown_table`, by default of all columns."""
  # What only prints a table need not be there before the flags are checked.
  from research.core import report

  print(report.markdown_table(lines, columns or list(lines[0])), end="")


def keep(
  path: str | None, rows: Sequence[Mapping[str, Any]], began: float, **more: Any
) -> None:
  """Writes the result file of a run, where --result asks for one.

  Args:
    path: of the file, or None.
    rows: of the result.
    began: `time.perf_counter()` at the start of the run.
    **more: further keys, see `write_result`.
  """
  if path:
    write_result(path, rows, command(), time.perf_counter() - began, **more)
    say(f"result: {path}")


def check_path(
  path: str | os.PathLike[str], wrong: str = "no such file"
) -> None:
  """Raises InputError, which says what is `wrong`, where nothing is there."""
  if not pathlib.Path(path).expanduser().exists():
    raise InputError(f"{path}: {wrong}")


def _fail(message: object) -> None:
  print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
  sys.exit(2)


def _keep_compiled_programs() -> None:
  """Names JAX the folder that `launch/local.sh` names, unless one is named."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{home}/frugax/jax")


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = parsed(argv)
  except flags.Error as error:
    _fail(InputError(error))
  except SystemExit:
    sys.exit(0)  # --help was asked for and given; absl would say failure.
  if rest[1:]:
    _fail(f"unexpected argument {rest[1]!r}: flags are written --name=value")
  return rest


def run(main: Callable[[list[str]], Any]) -> None:
  """Parses the flags and runs `main(argv)`; a user's mistake is one line.

  Exits with 2 for a bad flag and for what `models.errors.advice_on` knows, with
  130 for Ctrl-C, and with the `exit_code` of an exception (`loop.Stopped`).
  Bugs show a trace.
  """

  def guarded(argv: list[str]) -> Any:
    if not flags.FLAGS["verbosity"].present:
      # Libraries tell every file they write at INFO; users asked for a bar.
      logging.set_verbosity(logging.WARNING)
    most = _MOST_UNPACKED.value
    try:
      with input_files.unpacking(most and most * 1_000_000):
        return main(argv)
    except Exception as error:
      if line := advice_on(error):
        return _fail(line)
      if not hasattr(error, "exit_code"):
        raise
      print(" ".join(str(error).split()), file=sys.stderr)
      sys.exit(error.exit_code)

  _keep_compiled_programs()
  try:
    app.run(guarded, flags_parser=_parse)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
