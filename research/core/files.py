"""Files and folders that appear whole or not at all, and kept results.

The first half is `models.files`, under the same names.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models import arrays as arrays_lib
from models.errors import InputError
from models.files import (
  Path,
  errors_name,
  remove_drafts,
  whole,
  whole_folder,
  write_bytes,
  write_json,
  write_safetensors,
  write_text,
)

__all__ = [
  "Path",
  "digest",
  "digest_of_file",
  "errors_name",
  "kept",
  "read_npz",
  "remove_drafts",
  "whole",
  "whole_folder",
  "write_bytes",
  "write_json",
  "write_npz",
  "write_safetensors",
  "write_text",
]

_BELONGS_TO = "belongs_to"


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
  """Writes arrays by name."""
  # A stream and not a name: NumPy would add .npz to that of the draft.
  with whole(path) as draft, draft.open("wb") as stream:
    np.savez(stream, **arrays)


def kept(
  path: Path,
  belongs_to: Any,
  make: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
  """Arrays of an .npz file, which is made and written where it is absent.

  Args:
    path: of the file.
    belongs_to: all that decides the arrays, as `digest` takes it. It is kept
      in the file, so that a file of another run is found out.
    make: gives the arrays by name.

  Raises:
    InputError: the file is damaged, or belongs to something else.
  """
  # Scripts import this module before they check their flags, and JAX takes a
  # while to import.
  from research.core import processes

  path, owner = pathlib.Path(path), digest(belongs_to)
  arrays = processes.from_writer(
    lambda: read_npz(path) if path.exists() else None
  )
  if arrays is None:
    made = {name: np.asarray(array) for name, array in make().items()}
    processes.from_writer(
      lambda: write_npz(path, made | {_BELONGS_TO: np.array(owner)})
    )
    return made
  if str(arrays.pop(_BELONGS_TO, None)) != owner:
    raise InputError(
      f"{path}: was made for other options or other data: remove it, and it "
      "is made again"
    )
  return arrays


def read_npz(path: Path) -> dict[str, np.ndarray]:
  """Arrays by name.

  Raises:
    InputError: the file is absent or damaged.
  """
  if not pathlib.Path(path).exists():
    raise InputError(f"{path}: no such file")
  return arrays_lib.read_npz(path, "remove it, and it is made again")


def digest(value: Any) -> str:
  """SHA-256 of a value; equal for equal values, in every process.

  Args:
    value: None, a boolean, number, string or path; an array, by its shape, type
      and bytes; a dataclass; or a list, tuple or mapping of those, whose order
      of keys does not count.

  Raises:
    TypeError: a value is none of these.
  """
  found = hashlib.sha256()
  _feed(found, value)
  return found.hexdigest()


def digest_of_file(path: Path) -> str:
  """SHA-256 of the bytes of a file."""
  with open(path, "rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _feed(found, value: Any) -> None:
  if isinstance(value, Mapping):
    value = sorted(value.items(), key=lambda item: str(item[0]))
  elif dataclasses.is_dataclass(value):
    fields = [field.name for field in dataclasses.fields(value)]
    value = [type(value).__name__, *((n, getattr(value, n)) for n in fields)]
  if isinstance(value, list | tuple):
    found.update(f"[{len(value)}".encode())
    for item in value:
      _feed(found, item)
  elif value is None or isinstance(value, bool | int | float | str):
    found.update(f"{type(value).__name__} {value!r},".encode())
  elif isinstance(value, os.PathLike):
    _feed(found, os.fspath(value))
  elif hasattr(value, "__array__"):
    array = np.asarray(value)
    found.update(f"{array.dtype} {array.shape},".encode())
    if array.dtype.hasobject:
      _feed(found, array.tolist())
    else:
      found.update(np.ascontiguousarray(array).tobytes())
  else:
    raise TypeError(f"no digest of a {type(value).__name__}")
