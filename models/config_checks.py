"""Checks of a config's fields, whoever wrote them: a user, or a file that lies.

Each raises InputError with the name of the field; the file is named by whoever
read it (`models.input_files.errors_of_config`).
"""

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from models.errors import InputError, shown

# Sizes beyond these belong to no model, and take forever to lay out.
MOST_LAYERS = 4096
MOST = 2**31 - 1
_MOST_NUMBER = 1e30


def size(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
  """The value, if it is an integer between two bounds."""
  is_integer = isinstance(value, numbers.Integral)
  if not is_integer or isinstance(value, bool) or value < least:
    kind = "positive integer" if least else "integer from 0"
    raise InputError(f"{name}={shown(value)} is no {kind}")
  if value > most:
    raise InputError(f"{name}={shown(value)} is too large: at most {most:,}")
  return value


def positive(name: str, value: Any, most: float = _MOST_NUMBER) -> float:
  """The value, if it is a positive number up to a bound."""
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not 0 < value <= most:
    raise InputError(
      f"{name}={shown(value)} is no positive number up to {most:g}"
    )
  return value


def switch(name: str, value: Any) -> bool:
  """The value, if it is a boolean."""
  if not isinstance(value, bool):
    raise InputError(f"{name}={shown(value)} is neither true nor false")
  return value


def rising(name: str, values: Any, bound: int) -> Sequence[int]:
  """The values, if they are integers from 0 that rise below a bound."""
  if not isinstance(values, list | tuple):
    raise InputError(f"{name}={shown(values)} is no list of integers")
  before = -1
  for value in values:
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or not before < value < bound:
      raise InputError(
        f"{name} {shown(values)} do not rise within {bound} layers"
      )
    before = value
  return values


def sizes(config: Any, names: Iterable[str], least: int = 1) -> None:
  """Checks fields of a config that are sizes."""
  for name in names:
    most = MOST_LAYERS if "layers" in name else MOST
    size(name, getattr(config, name), least, most)


def heads(config: Any) -> None:
  """Checks that heads share keys evenly, and that rotations find pairs."""
  if config.num_heads % config.num_kv_heads:
    raise InputError(
      f"num_heads={config.num_heads} is no multiple of "
      f"num_kv_heads={config.num_kv_heads}"
    )
  if config.head_dim % 2:
    raise InputError(f"head_dim={config.head_dim} is odd: rotations need pairs")
