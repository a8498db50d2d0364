"""What every script shares: flags, one-line errors, and result files."""

import math
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

from models import locate
from models.errors import InputError, advice_on
from models.text import text_path
from research.results.files import command as command
from research.results.files import write_result as write_result

# --help lists the flags of the script: they are its own, not this module's.
flags.disclaim_key_flags()


class _Numbers(flags.ArgumentParser):
  """Parses "0.1,0.5" to [0.1, 0.5]; every number finite and in bounds."""

  syntactic_help = "comma separated numbers"

  def __init__(self, lower: float, upper: float):
    super().__init__()
    self.lower, self.upper = lower, upper

  def parse(self, argument: str | Sequence[float]) -> list[float]:
    parts = argument.split(",") if isinstance(argument, str) else argument
    found = [float(part) for part in parts]
    for value in found:
      if not (math.isfinite(value) and self.lower <= value <= self.upper):
        raise ValueError(f"{value} is not in [{self.lower:g}, {self.upper:g}]")
    return found


def integer(
  name: str,
  default: int | None,
  text: str,
  lower: int | None = None,
  upper: int | None = None,
) -> flags.FlagHolder:
  """Defines --name, an integer in [lower, upper]."""
  return flags.DEFINE_integer(
    name, default, text, lower_bound=lower, upper_bound=upper
  )


def number(
  name: str,
  default: float | None,
  text: str,
  lower: float | None = None,
  upper: float | None = None,
) -> flags.FlagHolder:
  """Defines --name, a finite number in [lower, upper]."""
  holder = flags.DEFINE_float(
    name, default, text, lower_bound=lower, upper_bound=upper
  )
  flags.register_validator(
    name,
    lambda value: value is None or math.isfinite(value),
    message="must be a finite number",
  )
  return holder


def numbers(
  name: str,
  default: Sequence[float],
  text: str,
  lower: float = -math.inf,
  upper: float = math.inf,
) -> flags.FlagHolder:
  """Defines --name=0.1,0.5: finite numbers in [lower, upper], as a list."""
  return flags.DEFINE(
    _Numbers(lower, upper),
    name,
    list(default),
    text,
    serializer=flags.CsvListSerializer(","),
  )


def choice(
  name: str, default: str | None, text: str, names: Sequence[str]
) -> flags.FlagHolder:
  """Defines --name, one of `names`; any other value lists them."""
  return flags.DEFINE_enum(name, default, list(names), text)


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


def check_there(
  models: Sequence[str | None] = (), texts: Sequence[str] = ()
) -> None:
  """Checks names of models and texts, before libraries that take seconds.

  Raises:
    InputError: one is not there.
  """
  for name in models:
    if name is not None:
      locate.find(name)
  for name in texts:
    text_path(name)


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
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    _fail(error)
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
    try:
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
