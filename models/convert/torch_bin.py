"""PyTorch's `.bin` files, read without PyTorch and without trust.

`torch.save` writes a zip archive: `data.pkl` holds the names, shapes and
strides, `data/<key>` the bytes of each storage. A pickle can call anything, so
this one is run by an unpickler that knows three things (an ordered dict, the
storage types, and the function that makes a tensor of a storage) and refuses
the file at the first other one, before anything of it runs.
"""

import io
import math
import pathlib
import pickle
import pickletools
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from models import input_files
from models.errors import InputError, reason, shown

_REBUILD = "torch._utils _rebuild_tensor_v2"
_ORDERED_DICT = "collections OrderedDict"
_STORAGES = {
  "torch DoubleStorage": np.float64,
  "torch FloatStorage": np.float32,
  "torch HalfStorage": np.float16,
  "torch BFloat16Storage": jnp.bfloat16,
  "torch LongStorage": np.int64,
  "torch IntStorage": np.int32,
  "torch ShortStorage": np.int16,
  "torch CharStorage": np.int8,
  "torch ByteStorage": np.uint8,
  "torch BoolStorage": np.bool_,
}
# All that a dict of tensors needs. What they can call is bounded by
# `find_class`; opcodes that make objects in other ways are not among them.
_OPCODES = frozenset(
  "PROTO FRAME STOP MARK POP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET "
  "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
  "SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND "
  "APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL BINPERSID REDUCE "
  "BUILD".split()
)
# Those whose results can be keys of a dict.
_HASHABLE = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPERSID", "REDUCE")
_MARK = None
# Parts of a tuple that PyTorch writes: an axis each, and some ten more.
_WEIGHT = 1000
# How often tensors may share their bytes; tied ones do so twice.
_SHARED = 8
_MAGIC = b"PK\x03\x04"
_ADVICE = "get it again, or a version with safetensors"


class _Storage(NamedTuple):
  """The bytes of one or several tensors.

  A tuple, as all that a pickle gets hold of here: it cannot be changed.
  """

  key: str
  dtype: np.dtype
  size: int


class _StateDict(dict):
  """An ordered dict that drops the attributes PyTorch hangs on it."""

  __slots__ = ()

  def __setstate__(self, state):
    del state


class _Refused(Exception):
  """Names the part of a pickle that is not admitted."""


class LazyTensor(NamedTuple):
  """A tensor whose bytes are still in the archive.

  Attributes:
    storage: where its elements are.
    offset: of the first one, in elements.
    shape: its axes.
    strides: of the axes, in elements.
  """

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Rebuild:
  """What stands for `torch._utils._rebuild_tensor_v2`."""

  __slots__ = ()

  def __call__(self, storage, offset, shape, strides, *ignored):
    del ignored
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
      raise _Refused("a tensor without a storage")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
      raise _Refused("a tensor of odd sizes")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    # The second bound keeps a stride of 0 from making much out of little.
    if 0 not in shape and max(last + 1, math.prod(shape)) > storage.size:
      raise _Refused("a tensor that reaches beyond its storage")
    return LazyTensor(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    _check_global(f"{module} {name}")
    if f"{module} {name}" == _REBUILD:
      return _Rebuild()
    if f"{module} {name}" == _ORDERED_DICT:
      return _StateDict
    # The class is kept as a name and not as a type, so that nothing can be
    # called or set on it.
    return f"{module} {name}"

  def persistent_load(self, pid: Any) -> _Storage:
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
      raise _Refused(f"the reference {shown(pid)}")
    _, kind, key, _, size = pid
    # Values are asked for their type first, because tuples that hold themselves
    # many times take forever to be hashed.
    if not isinstance(kind, str) or kind not in _STORAGES:
      raise _Refused(f"the storage {shown(kind)}")
    if not isinstance(key, str) or not key.isalnum():
      raise _Refused(f"the storage {shown(kind)} {shown(key)}")
    if type(size) is not int or size < 0:
      raise _Refused(f"a storage of {shown(size)} elements")
    return _Storage(key, np.dtype(_STORAGES[kind]), size)


def _check_global(name: str) -> None:
  if name not in (_REBUILD, _ORDERED_DICT, *_STORAGES):
    raise _Refused(f"global '{name.replace(' ', '.')}'")


def is_torch(path: pathlib.Path) -> bool:
  """Whether a `.bin` file looks like one of PyTorch."""
  try:
    with path.open("rb") as file:
      return file.read(len(_MAGIC)) == _MAGIC
  except OSError:
    return False


class Archive:
  """One `.bin` file, as `models.convert.shards` asks for.

  Attributes:
    path: of the file.
    tensors: by name, as the file has them.
  """

  def __init__(self, path: pathlib.Path):
    """Reads the names, and no bytes of a tensor.

    Raises:
      InputError: the file is damaged, or holds anything but tensors.
    """
    self.path = input_files.regular(path, _ADVICE)
    try:
      self._zip = zipfile.ZipFile(path)
      self._root = _root(self._zip)
      self.tensors = _tensors(self._member("data.pkl"))
      _check_total(self.tensors, self.path.stat().st_size)
    except OSError as error:
      raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    except zipfile.BadZipFile as error:
      raise InputError(
        f"{path}: was cut short, or is no file of PyTorch 1.6 or newer: "
        f"{_ADVICE}"
      ) from error
    except _Refused as error:
      raise InputError(
        f"{path}: refused, since it holds more than tensors: {error}: use a "
        "version with safetensors"
      ) from error
    except Exception as error:
      # Damaged pickles raise errors of every type.
      raise InputError(f"{path}: is damaged in its index: {_ADVICE}") from error

  def names(self) -> list[str]:
    """Names of its tensors."""
    return list(self.tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one, without reading it."""
    return self.tensors[name].shape

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor.

    Raises:
      InputError: its bytes are damaged or missing.
    """
    label = f"{self.path}: tensor {name!r}"
    with input_files.errors_at(label, _ADVICE, "is damaged or cut short"):
      return self._elements(self.tensors[name])

  def _elements(self, tensor: LazyTensor) -> np.ndarray:
    storage = tensor.storage
    data = self._member(f"data/{storage.key}")
    if len(data) != storage.size * storage.dtype.itemsize:
      raise zipfile.BadZipFile(storage.key)
    flat = np.frombuffer(data, storage.dtype)[tensor.offset :]
    strides = [n * flat.itemsize for n in tensor.strides]
    return np.lib.stride_tricks.as_strided(
      flat, tensor.shape, strides, writeable=False
    )

  def _member(self, name: str) -> bytes:
    info = self._zip.getinfo(f"{self._root}/{name}")
    # PyTorch never compresses; a small file must not become a large one.
    if info.compress_type != zipfile.ZIP_STORED:
      raise zipfile.BadZipFile(name)
    return self._zip.read(info)


def _root(archive: zipfile.ZipFile) -> str:
  """The folder inside the archive, named as the file once was."""
  names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
  if len(names) != 1:
    raise zipfile.BadZipFile("data.pkl")
  root = names[0].removesuffix("/data.pkl")
  order = f"{root}/byteorder"
  if order in archive.namelist() and archive.read(order) != b"little":
    raise _Refused("numbers in big-endian order")
  return root


def _check_total(tensors: dict[str, LazyTensor], size: int) -> None:
  """Refuses many tensors of the same bytes, which become so many arrays."""
  total = sum(
    math.prod(tensor.shape) * tensor.storage.dtype.itemsize
    for tensor in tensors.values()
  )
  if total > _SHARED * size:
    raise _Refused(f"tensors of {total} bytes in a file of {size}")


def _check_opcodes(pickled: bytes) -> None:
  """Walks through a pickle without running it; raises _Refused.

  A tuple may hold another one a hundred times, as that one does a third. Such
  takes few bytes and no memory, but no computer ends to hash or to print it.
  So tuples are weighed as if they were written out.
  """
  stack: list[Any] = []
  memo: dict[int, Any] = {}
  for opcode, argument, _ in pickletools.genops(pickled):
    name = opcode.name
    if name == "GLOBAL":
      _check_global(argument)
    elif name not in _OPCODES:
      raise _Refused(f"pickle opcode {name}")
    elif name == "LONG_BINPUT" and argument > len(pickled):
      raise _Refused(f"{argument} entries in {len(pickled)} bytes")
    if name in ("BINPUT", "LONG_BINPUT"):
      memo[argument] = stack[-1]
    elif name == "MEMOIZE":
      memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      stack.append(memo[argument])
    else:
      weight = 1 + sum(_popped(stack, opcode.stack_before))
      if name not in _HASHABLE:
        weight = 1
      elif weight > _WEIGHT:
        raise _Refused("a tuple of too many parts")
      for made in opcode.stack_after:
        is_mark = made is pickletools.markobject
        stack.append(_MARK if is_mark else weight)


def _popped(stack: list[Any], before: list[Any]) -> list[int]:
  """Weights that an opcode takes from the stack."""
  found = []
  for what in reversed(before):
    if what is pickletools.stackslice:
      while (weight := stack.pop()) is not _MARK:
        found.append(weight)
    elif what is not pickletools.markobject:
      found.append(stack.pop() or 0)
  return found


def _tensors(pickled: bytes) -> dict[str, LazyTensor]:
  _check_opcodes(pickled)
  found = _Unpickler(io.BytesIO(pickled)).load()
  if not isinstance(found, dict):
    raise _Refused(f"a {type(found).__name__} in the place of a dict")
  for name, tensor in found.items():
    if not isinstance(name, str) or not isinstance(tensor, LazyTensor):
      raise _Refused(f"entry {shown(name)} of type {type(tensor).__name__}")
  return dict(found)
