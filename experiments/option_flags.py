"""Flags from a dataclass of options, one for each field."""

import dataclasses
import typing
from collections.abc import Collection

from absl import flags

import cli

# --help lists the flags of the script: they are its own, not this module's.
flags.disclaim_key_flags()


def define(
  kind: type, without: Collection[str] = ()
) -> dict[str, flags.FlagHolder]:
  """Defines a flag for every field of a dataclass of options.

  Args:
    kind: a dataclass whose fields are integers, numbers, booleans or strings
      (or None), with metadata "text" and "bounds": "lower" and "upper", or
      "choices".
    without: fields that get no flag, since the script does nothing with them.

  Returns:
    The flags by name; their defaults are the fields'.
  """
  return {
    field.name: _define(field)
    for field in dataclasses.fields(kind)
    if field.name not in without
  }


def _define(field: dataclasses.Field) -> flags.FlagHolder:
  text, bounds = field.metadata["text"], field.metadata["bounds"]
  types = typing.get_args(field.type) or (field.type,)
  if "choices" in bounds:
    return cli.choice(field.name, field.default, text, bounds["choices"])
  if bool in types:
    return flags.DEFINE_bool(field.name, field.default, text)
  if int in types:
    return cli.integer(field.name, field.default, text, **bounds)
  if float in types:
    return cli.number(field.name, field.default, text, **bounds)
  return flags.DEFINE_string(field.name, field.default, text)
