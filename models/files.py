"""Files and folders that appear whole or not at all.

What is written is a draft beside its place, which takes the place by one
rename. A process that is killed leaves the file of before, or none, and a
hidden draft that `remove_drafts` clears away.
"""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models.errors import is_disk_full

Path = str | os.PathLike[str]

_DRAFT = ".draft"


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


def write_safetensors(
  path: Path,
  arrays: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes arrays by name as a safetensors file.

  Args:
    path: of the file.
    arrays: of any shapes, (), (N,) and so on, by name.
    metadata: of its header.
  """
  # Scripts import this module before they check their flags, and the library
  # takes a while to import.
  import safetensors.numpy

  with whole(path) as draft:
    draft.touch()
    permissions = draft.stat().st_mode
    safetensors.numpy.save_file(
      dict(arrays), draft, metadata=metadata and dict(metadata)
    )
    # The library makes a file that its owner alone may read, so the draft gets
    # the permissions back that the umask gives every other file.
    draft.chmod(permissions)


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
