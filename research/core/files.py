"""Files and folders that appear whole or not at all, and kept results.

What is written is a draft beside its place, which takes the place by one
rename. A process that is killed leaves the file of before, or none, and a
hidden draft that `remove_drafts` clears away.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from models.errors import InputError, is_disk_full

Path = str | os.PathLike[str]

_DRAFT = ".draft"
_BELONGS_TO = "belongs_to"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[pathlib.Path]:
  """Gives the name of a draft that becomes the file `path` after the block.

  An error in the block removes the draft and leaves `path` as it was. The
  folder of `path` is made if it is absent.

  Args:
    path: of the file; one that exists is replaced.

  Raises:
    OSError: the file cannot be written. The error has the name of the file,
      and is an OSError for a full disk, too, which libraries report each in its
      own way.
  """
  path = pathlib.Path(path)
  with _draft(path) as draft:
    yield draft
    _sync(draft)
    draft.replace(path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[pathlib.Path]:
  """Gives an empty draft of a folder that becomes `path` after the block.

  Args:
    path: of the folder, which must be absent or empty when the block ends.

  Raises:
    FileExistsError: the folder is there and holds something.
    OSError: as `whole`.
  """
  path = pathlib.Path(path)
  with _draft(path) as draft:
    draft.mkdir()
    yield draft
    for file in draft.rglob("*"):
      if file.is_file():
        _sync(file)
    try:
      draft.rename(path)
    except OSError as error:
      if path.exists():
        raise FileExistsError(
          errno.EEXIST, "exists and is not overwritten", str(path)
        ) from error
      raise


@contextlib.contextmanager
def errors_name(path: Path, draft: Path | None = None) -> Iterator[None]:
  """Makes errors of the block name the file `path`, and not its draft.

  Raises:
    OSError: for a full disk, too, which libraries report each in its own way.
  """
  try:
    yield
  except Exception as error:
    if is_disk_full(error):
      number = getattr(error, "errno", None) or errno.ENOSPC
      raise OSError(number, os.strerror(number), str(path)) from error
    if isinstance(error, OSError) and error.filename in (None, str(draft)):
      error.filename = str(path)
    raise


def remove_drafts(folder: Path) -> None:
  """Removes what killed processes left in a folder, not in those within it.

  Nobody else may write there meanwhile.
  """
  for draft in list(pathlib.Path(folder).glob(f".*{_DRAFT}")):
    _remove(draft)


def write_text(path: Path, text: str) -> None:
  """Writes `text` in UTF-8."""
  write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
  """Writes `data`."""
  with whole(path) as draft:
    draft.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
  """Writes `value` as indented JSON.

  Raises:
    ValueError: a number is NaN or infinite, which JSON cannot hold; see
      `metrics.to_json_value`.
  """
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


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
  path, owner = pathlib.Path(path), digest(belongs_to)
  if not path.exists():
    made = {name: np.asarray(array) for name, array in make().items()}
    write_npz(path, made | {_BELONGS_TO: np.array(owner)})
    return made
  arrays = read_npz(path)
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
  try:
    # NumPy leaves a file open that it opened itself and cannot read.
    with open(path, "rb") as stream:
      return dict(np.load(stream, allow_pickle=False))
  except FileNotFoundError as error:
    raise InputError(f"{path}: no such file") from error
  # NumPy, zipfile and zlib each have errors of their own for the same thing;
  # AttributeError and TypeError come of a lone array, which is no archive.
  except (
    OSError, ValueError, EOFError, KeyError, AttributeError, TypeError,
    NotImplementedError, zipfile.BadZipFile, zlib.error,
  ) as error:  # fmt: skip
    raise InputError(
      f"{path}: is damaged: remove it, and it is made again"
    ) from error


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


@contextlib.contextmanager
def _draft(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A free name beside `path`, of which nothing is left after the block."""
  draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_DRAFT}")
  try:
    with errors_name(path, draft):
      path.parent.mkdir(parents=True, exist_ok=True)
      yield draft
  finally:
    _remove(draft)


def _remove(draft: pathlib.Path) -> None:
  if draft.is_dir():
    shutil.rmtree(draft, ignore_errors=True)
  else:
    draft.unlink(missing_ok=True)


def _sync(file: pathlib.Path) -> None:
  """Waits until the bytes of a file are on the disk, before its rename is."""
  with file.open("rb") as stream:
    os.fsync(stream.fileno())
