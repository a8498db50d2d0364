"""Files that users bring, in whatever state: each failure is one clear line.

A file may be cut short, packed, damaged, or made to deceive. All readers open
theirs here and put what they do with the bytes into `errors_at`, so that no
exception of a library or of the interpreter reaches a user.
"""

import bz2
import contextlib
import contextvars
import gzip
import io
import json
import lzma
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from models.errors import InputError, is_disk_full, is_panic, reason, shown

Path = str | os.PathLike[str]

AGAIN = "get the file again"
_OPENERS = {
  b"\x1f\x8b": gzip.open,
  b"\xfd7zXZ\x00": lzma.open,
  b"BZh": bz2.open,
}
_PIECE = 1 << 20
# A packed file may become so many times as large, and so many bytes more,
# before it is taken for one that was made to fill the memory.
_RATIO, _ROOM = 16, 1 << 25
_most_unpacked = contextvars.ContextVar[int | None](
  "most_unpacked", default=None
)


@contextlib.contextmanager
def errors_at(
  path: object, advice: str = AGAIN, wrong: str = "is damaged"
) -> Iterator[None]:
  """Turns errors of the block, which reads the file `path`, into InputError.

  Damaged files raise anything in parsers: RecursionError, OverflowError,
  zlib.error, AttributeError, or MemoryError where a size lies. Nothing but the
  reading should stand in the block, since bugs in it look like damage.

  Args:
    path: of the file, or another name of it, for the message.
    advice: what a user can do.
    wrong: what is wrong with a file that can be opened.

  Raises:
    InputError: for every error but a full disk.
  """
  try:
    yield
  except InputError:
    raise
  except FileNotFoundError as error:
    raise InputError(f"{path}: is missing: {advice}") from error
  except Exception as error:
    if is_disk_full(error):
      raise
    raise InputError(f"{path}: {wrong}: {advice} ({reason(error)})") from error
  except BaseException as error:
    if not is_panic(error):
      raise
    raise InputError(f"{path}: {wrong}: {advice}") from error


@contextlib.contextmanager
def errors_of_config(path: object) -> Iterator[None]:
  """The same where a config is made of what a file says; names the file.

  Args:
    path: of the file.

  Raises:
    InputError: for every error.
  """
  with errors_at(path, "correct the config", "does not describe a model"):
    try:
      yield
    except InputError as error:
      if str(error).startswith(str(path)):
        raise
      raise InputError(f"{path}: {error}: correct the config") from error


def regular(path: Path, advice: str = AGAIN) -> pathlib.Path:
  """A path that is a file: no folder, device or pipe, which never end.

  Raises:
    InputError: it is none, or is missing.
  """
  path = pathlib.Path(path).expanduser()
  with errors_at(path, advice, "cannot be opened"):
    if path.is_file():
      return path
    if path.exists():
      raise InputError(
        f"{path}: cannot be read: it is no file, but a folder, device or pipe: "
        f"{advice}"
      )
  raise InputError(f"{path}: is missing: {advice}")


def beside(index: pathlib.Path, name: Any, advice: str = AGAIN) -> pathlib.Path:
  """The file that another one names, which must not lead out of its folder.

  Raises:
    InputError: it does, is missing, or the name is none.
  """
  inside = isinstance(name, str) and name not in ("", ".") and "\0" not in name
  if inside:
    parts = pathlib.PurePath(name)
    inside = not parts.is_absolute() and ".." not in parts.parts
  if not inside:
    raise InputError(
      f"{index}: names the file {shown(name)}, which is none of its folder: "
      f"{advice}"
    )
  path = index.parent / name
  return regular(path, f"{index.name} lists it: {advice}")


def read_bytes(path: Path, advice: str = AGAIN) -> bytes:
  """All bytes of a file, unpacked if the first ones are of gzip, xz or bzip2.

  Raises:
    InputError: it is missing, cut short or damaged, or it unpacks to more than
      `unpacking` admits.
  """
  path = regular(path, advice)
  with errors_at(path, advice, "cannot be read, or was cut short"):
    return unpacked(path.read_bytes(), path)


def is_packed(path: Path) -> bool:
  """Whether the first bytes of a file are of gzip, xz or bzip2.

  Raises:
    InputError: it is missing or cannot be read.
  """
  path = regular(path)
  with errors_at(path, wrong="cannot be read"), path.open("rb") as file:
    return file.read(6).startswith(tuple(_OPENERS))


def unpacked(data: bytes, path: object) -> bytes:
  """What is in packed bytes; others are given back as they are.

  Args:
    data: of a file.
    path: of it, for messages.

  Raises:
    InputError: there is too much in them.
    Exception: they are damaged.
  """
  for first, opener in _OPENERS.items():
    if data.startswith(first):
      with opener(io.BytesIO(data)) as stream:
        return read_bounded(stream, len(data), path)
  return data


def read_bounded(stream: IO[bytes], size: int, path: object) -> bytes:
  """Reads a stream that unpacks, up to what `unpacking` admits.

  Args:
    stream: of unpacked bytes.
    size: of the packed bytes.
    path: of the file, for messages.

  Raises:
    InputError: there is more.
  """
  most = most_unpacked(size)
  found = bytearray()
  while piece := stream.read(_PIECE):
    found += piece
    if len(found) > most:
      raise too_much(path, most, size)
  return bytes(found)


def most_unpacked(size: int) -> int:
  """Bytes that a packed file of `size` bytes may unpack to; see `unpacking`."""
  return _most_unpacked.get() or _RATIO * size + _ROOM


def too_much(path: object, most: int, size: int) -> InputError:
  """The error for a file of `size` bytes that unpacks to more than `most`."""
  return InputError(
    f"{path}: unpacks to more than {most / 1e6:,.0f} MB from "
    f"{size / 1e6:,.1f}: if that is no mistake, unpack it, or give more as "
    "--most_unpacked_mb"
  )


@contextlib.contextmanager
def unpacking(most: int | None) -> Iterator[None]:
  """Sets how many bytes a file may unpack to in the block.

  Args:
    most: such bytes; None admits 16 times the file and 32 MB.
  """
  before = _most_unpacked.set(most)
  try:
    yield
  finally:
    _most_unpacked.reset(before)


def read_text(path: Path, advice: str = AGAIN) -> str:
  """A text in UTF-8, whose mark at the beginning is left out.

  Raises:
    InputError: as `read_bytes`, or it is no UTF-8.
  """
  return decoded(path, read_bytes(path, advice))


def decoded(path: Path, data: bytes, encoding: str = "utf-8-sig") -> str:
  """The text of a file's bytes; raises InputError where it is none."""
  try:
    return data.decode(encoding)
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b"\n") + 1
    raise InputError(
      f"{path} line {line}: is not UTF-8 text: convert it, such as by"
      " iconv -f latin1 -t utf-8"
    ) from error


def read_json(path: Path, kind: type = dict, advice: str = AGAIN) -> Any:
  """A JSON file whose outermost value is of a kind, by default an object.

  Raises:
    InputError: as `read_text`, or it is no such JSON.
  """
  return parse_json(read_text(path, advice), path, kind, advice)


def read_kept(path: Path, kind: type = dict, advice: str = "remove it") -> Any:
  """The same of a file that a run wrote, whose every fault is damage.

  Raises:
    InputError: as `read_json`.
  """
  path = regular(path, advice)
  with errors_at(path, advice):
    value = json.loads(path.read_bytes())
    if not isinstance(value, kind):
      raise TypeError(f"a {type(value).__name__}")
    return value


def parse_json(
  text: str, path: object, kind: type = dict, advice: str = AGAIN
) -> Any:
  """The same of a text.

  Args:
    text: JSON.
    path: where it stands, for messages.
    kind: of its outermost value.
    advice: what a user can do.

  Raises:
    InputError: it is no such JSON.
  """
  with errors_at(path, advice, "is no readable JSON"):
    value = json.loads(text)
  if not isinstance(value, kind):
    what = "JSON object" if kind is dict else "JSON list"
    raise InputError(f"{path}: is no {what}: {advice}")
  return value
