"""Options as frozen dataclasses, of which scripts make flags."""

import dataclasses
import math
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from models.errors import InputError, shown

SCHEDULES = ("cosine", "wsd", "constant")


def option(default: Any, text: str, **bounds: Any) -> Any:
  """A field that `experiments/option_flags.py` turns into a flag.

  Args:
    default: of the field and the flag.
    text: what --help says.
    **bounds: "lower" and "upper" of a number, or "choices" of a word.
  """
  return dataclasses.field(
    default=default, metadata={"text": text, "bounds": bounds}
  )


def from_json[T](kind: type[T], described: Mapping[str, Any]) -> T:
  """Options of a file, held to the types and bounds that flags are held to.

  Args:
    kind: a dataclass of fields made by `option`.
    described: values by name.

  Raises:
    InputError: a name is unknown, or a value would not do as a flag.
  """
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for name, value in described.items():
    if name not in fields:
      raise InputError(f"{shown(name)} is no option of {kind.__name__}")
    _check(fields[name], value)
  return kind(**described)


def _check(field: dataclasses.Field, value: Any) -> None:
  types = typing.get_args(field.type) or (field.type,)
  numbers = (int, float) if float in types else types
  bounds = field.metadata["bounds"]
  does = type(value) in numbers
  if does and isinstance(value, int | float) and not isinstance(value, bool):
    low, high = bounds.get("lower"), bounds.get("upper")
    does = math.isfinite(value)
    does &= (low is None or value >= low) and (high is None or value <= high)
  if does and "choices" in bounds and value is not None:
    does = value in bounds["choices"]
  if not does:
    raise InputError(f"{field.name}={shown(value)} is no value of this option")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
  """How `loop.run` carries a run out.

  Attributes:
    workdir: folder of the run; made if absent.
    flags: what decides the numbers, as JSON values. A workdir takes no other
      flags afterwards.
    checkpoint_every: updates between checkpoints; the last is always saved.
    log_every: updates between lines of metrics.
    keep: checkpoints kept.
    progress: show progress on stderr.
    shown: names of the metrics that it shows.
  """

  workdir: pathlib.Path
  flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  checkpoint_every: int = 500
  log_every: int = 10
  keep: int = 3
  progress: bool = True
  shown: tuple[str, ...] = ("loss",)
