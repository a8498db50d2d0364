"""Shapes of meshes in words, as the flag --mesh has them."""

import types
from collections.abc import Mapping

from models.errors import InputError

# Every axis, and what it cuts.
AXES: Mapping[str, str] = types.MappingProxyType(
  {
    "data": "rows of a batch, with all parameters on every device",
    "fsdp": "rows of a batch, and parameters and optimizer with them",
    "sequence": "tokens of a row",
    "tensor": "heads and widths of a layer",
  }
)


def parse(text: str) -> dict[str, int]:
  """Sizes by axis of "data:4,tensor:2".

  Raises:
    InputError: an axis is unknown or comes twice, or a size is not positive.
  """
  found: dict[str, int] = {}
  for part in text.split(","):
    name, colon, size = part.strip().partition(":")
    if name not in AXES:
      raise InputError(
        f"--mesh={text}: there is no axis {name!r}: take {', '.join(AXES)}, as "
        "in data:4,tensor:2"
      )
    if name in found:
      raise InputError(f"--mesh={text}: {name} comes twice: give it once")
    if not (colon and size.isdecimal() and int(size)):
      raise InputError(
        f"--mesh={text}: {name} needs a number of devices, as in {name}:2"
      )
    found[name] = int(size)
  return found


def words(shape: Mapping[str, int]) -> str:
  """The inverse of `parse`."""
  return ",".join(f"{name}:{size}" for name, size in shape.items())
