"""Kinds of flags, whose values are checked as they are parsed; see `cli`."""

import itertools
import math
from collections.abc import Sequence

from absl import flags

# --help lists the flags of the script: they are its own, not this module's.
flags.disclaim_key_flags()


_LONGEST_NAME = 500


class _Numbers(flags.ArgumentParser):
  """Parses "0.1,0.5" to [0.1, 0.5]; all finite, in bounds and of a kind."""

  syntactic_help = "comma separated numbers"

  def __init__(self, lower: float, upper: float, kind: type = float):
    super().__init__()
    self.lower, self.upper, self.kind = lower, upper, kind

  def parse(self, argument: str | Sequence[float]) -> list[float]:
    parts = argument.split(",") if isinstance(argument, str) else argument
    found = [float(part) for part in parts]
    for value in found:
      if not (math.isfinite(value) and self.lower <= value <= self.upper):
        raise ValueError(f"{value} is not in [{self.lower:g}, {self.upper:g}]")
      if self.kind(value) != value:
        raise ValueError(f"{value} is no whole number")
    return [self.kind(value) for value in found]


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
  return _listed(_Numbers(lower, upper), name, default, text)


def integers(
  name: str,
  default: Sequence[int],
  text: str,
  lower: float = -math.inf,
  upper: float = math.inf,
) -> flags.FlagHolder:
  """Defines --name=1,5: integers in [lower, upper], as a list."""
  return _listed(_Numbers(lower, upper, int), name, default, text)


def _listed(parser, name, default, text) -> flags.FlagHolder:
  return flags.DEFINE(
    parser,
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


def _check_names(words: Sequence[str]) -> None:
  """Refuses names that are far too long for a flag.

  absl compares an unknown name with all that it knows, which takes 800 bytes of
  memory for each of its characters.
  """
  for word in itertools.takewhile(lambda word: word != "--", words):
    name = word.partition("=")[0]
    if name.startswith("-") and len(name) > _LONGEST_NAME:
      raise flags.Error(
        f"{name[:20]!r}... is no flag: it has {len(name):,} characters"
      )


def parsed(argv: list[str]) -> list[str]:
  """Parses all flags, and gives back what is none.

  Raises:
    flags.Error: for flagfiles, too, that are no text or name themselves, whose
      errors absl lets pass as they are.
  """
  try:
    words = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    _check_names(words)
    rest = flags.FLAGS([argv[0], *words])
  except (ValueError, RecursionError, OSError) as error:
    line = " ".join(str(error).split())
    raise flags.Error(f"flags or a flagfile cannot be read: {line}") from error
  for name in flags.FLAGS:
    if "\0" in str(flags.FLAGS[name].value):
      raise flags.Error(f"--{name} has a zero byte: give it anew")
  return rest
