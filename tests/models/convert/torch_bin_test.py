import builtins
import collections
import io
import pathlib
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from models.convert.torch_bin import Archive, is_torch
from models.errors import InputError

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
_WHOLE = (_GOLDEN / "torch_state_dict.bin").read_bytes()
_REBUILD = "torch._utils _rebuild_tensor_v2"


def _global(name):
  module, attribute = name.split(" ")
  return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def _integer(value):
  return pickle.dumps(value, 2)[2:-1]


def _string(text):
  return b"X" + struct.pack("<I", len(text)) + text.encode()


def _tensor(
  shape=(2, 2), strides=(2, 1), offset=0, size=4, kind="torch FloatStorage"
):
  """The opcodes of one tensor, as PyTorch writes them."""
  storage = b"(" + _string("storage") + _global(kind) + _string("0")
  storage += _string("cpu") + _integer(size) + b"tQ"
  arguments = storage + _integer(offset) + _integer(shape) + _integer(strides)
  hooks = _global("collections OrderedDict") + b")R"
  return _global(_REBUILD) + b"(" + arguments + b"\x89" + hooks + b"tR"


def _write(path, value, data=bytes(16), compression=zipfile.ZIP_STORED, **more):
  """An archive whose pickle is {"weight": value}; `value` is opcodes."""
  pickled = b"\x80\x02}" + _string("weight") + value + b"s."
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("model/data.pkl", more.pop("pickled", pickled))
    archive.writestr("model/data/0", data)
    for name, text in more.items():
      archive.writestr(f"model/{name}", text)
  return path


def _fails(path, *parts):
  with pytest.raises(InputError) as caught:
    archive = Archive(path)
    for name in archive.names():
      archive.read(name)
  message = str(caught.value)
  assert "\n" not in message
  for part in (str(path), *parts):
    assert part in message, message


def test_every_tensor_of_a_file_by_pytorch():
  archive = Archive(_GOLDEN / "torch_state_dict.bin")
  with np.load(_GOLDEN / "torch_state_dict.npz") as expected:
    assert archive.names() == expected.files
    for name in expected.files:
      found = archive.read(name)
      assert found.shape == archive.shape(name)
      dtype = jnp.bfloat16 if name == "brain" else expected[name].dtype
      assert found.dtype == dtype
      np.testing.assert_array_equal(found, expected[name].astype(dtype))


def test_is_torch(tmp_path):
  assert is_torch(_GOLDEN / "torch_state_dict.bin")
  (tmp_path / "other.bin").write_bytes(b"\x40\x00\x00\x00")
  assert not is_torch(tmp_path / "other.bin")
  assert not is_torch(tmp_path / "none.bin")


def test_what_these_tests_write_is_read(tmp_path):
  data = np.arange(4, dtype="<f4").tobytes()
  archive = Archive(_write(tmp_path / "m.bin", _tensor(), data))
  expected = np.arange(4.0).reshape(2, 2)
  np.testing.assert_array_equal(archive.read("weight"), expected)


class _Call:
  """Pickles as a call, the way an attack does."""

  def __init__(self, function, *arguments):
    self._call = function, arguments

  def __reduce__(self):
    return self._call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
  ("function", "name"),
  [
    (builtins.exec, "builtins.exec"),
    (builtins.getattr, "builtins.getattr"),
    (io.open, "io.open"),
  ],
)
def test_a_pickle_that_calls_is_refused_and_not_run(
  function, name, protocol, tmp_path
):
  target = tmp_path / "was_here"
  arguments = {
    "builtins.exec": (f"open({str(target)!r}, 'w')",),
    "builtins.getattr": (str, "mro"),
    "io.open": (str(target), "w"),
  }[name]
  pickled = pickle.dumps({"weight": _Call(function, *arguments)}, protocol)
  path = _write(tmp_path / "m.bin", b"", pickled=pickled)
  # Before protocol 2 the opcodes are others, and refused at sight.
  shown = name if protocol >= 2 else "refused"
  shown = shown.replace("builtins", "__builtin__") if protocol == 2 else shown
  _fails(path, shown)
  assert not target.exists()


@pytest.mark.parametrize(
  "name",
  [
    "os system",
    "torch._utils _rebuild_parameter",
    "torch load",
    "torch FloatTensor",
    "collections OrderedDict.fromkeys",
    "numpy._core.multiarray _reconstruct",
    "argparse Namespace",
  ],
)
def test_globals_are_refused_by_name(name, tmp_path):
  path = _write(tmp_path / "m.bin", _global(name) + b")R")
  _fails(path, name.replace(" ", "."), "safetensors")
  # The same by the opcode that takes the name from the stack.
  module, attribute = name.split(" ")
  value = _string(module) + _string(attribute) + b"\x93)R"
  _fails(_write(path, value), name.replace(" ", "."))


@pytest.mark.parametrize(
  ("value", "part"),
  [
    # Objects made past `find_class`, or with an extension registry.
    (b"(" + _global("collections OrderedDict") + b"o", "OBJ"),
    (b"(icollections\nOrderedDict\n", "INST"),
    (_global("collections OrderedDict") + b")\x81", "NEWOBJ"),
    (b"\x82\x01", "EXT1"),
    (b"C\x01a", "SHORT_BINBYTES"),
    (b"Pstorage\n", "PERSID"),
    (b"K\x01r\xff\xff\xff\x7f", "entries"),
    (_integer(3), "'weight' of type int"),
    (_global("torch FloatStorage"), "'weight' of type str"),
    (_global(_REBUILD), "'weight' of type _Rebuild"),
  ],
)
def test_all_but_tensors_is_refused(value, part, tmp_path):
  _fails(_write(tmp_path / "m.bin", value), part)


@pytest.mark.parametrize(
  "value",
  [
    # Attributes cannot be set on what a pickle gets hold of.
    _tensor() + b"N}" + _string("offset") + _integer(9) + b"s\x86b",
    _tensor() + b"}" + _string("offset") + _integer(9) + b"sb",
    _global(_REBUILD) + b"N}" + _string("__call__") + _integer(9) + b"s\x86b",
    _global("collections OrderedDict") + b"}" + _string("x") + b"Nsb",
    _global("collections OrderedDict") + b"N}" + _string("x") + b"Ns\x86b",
    _global("torch FloatStorage") + b"}" + _string("x") + b"Nsb",
    _global("torch FloatStorage") + b")R",
    _tensor() + b")R",
    b"0",
    b"",
  ],
)
def test_changing_what_is_admitted_fails(value, tmp_path):
  _fails(_write(tmp_path / "m.bin", value))


@pytest.mark.parametrize(
  "changes",
  [
    {"shape": (2, 3)},
    {"strides": (3, 1)},
    {"offset": 1},
    {"offset": -1},
    {"strides": (-2, 1)},
    {"shape": (-2, 2)},
    {"shape": (2,)},
    {"shape": (10**9,), "strides": (0,)},
    {"shape": (2.0, 2.0)},
    {"size": -4},
    {"kind": "collections OrderedDict"},
  ],
)
def test_a_tensor_stays_within_its_storage(changes, tmp_path):
  _fails(_write(tmp_path / "m.bin", _tensor(**changes)))


def test_storages_must_be_as_long_as_they_say(tmp_path):
  path = tmp_path / "m.bin"
  _fails(_write(path, _tensor(size=5)), "'weight'", "cut short")
  _fails(_write(path, _tensor(), data=bytes(15)), "'weight'", "cut short")
  squeezed = _write(path, _tensor(), compression=zipfile.ZIP_DEFLATED)
  _fails(squeezed, "cut short")
  _fails(_write(path, _tensor(), byteorder="big"), "big-endian")


def test_a_dict_of_other_keys_is_refused(tmp_path):
  path = tmp_path / "m.bin"
  _fails(_write(path, b"", pickled=b"\x80\x02]."), "list")
  pickled = b"\x80\x02}" + _integer(1) + _tensor() + b"s."
  _fails(_write(path, b"", pickled=pickled), "entry 1")
  metadata = collections.OrderedDict({"version": 1})
  _fails(_write(path, b"", pickled=pickle.dumps({"a": metadata}, 2)), "'a'")


@pytest.mark.parametrize("keep", [-1, -100, 2000, 60, 3, 0])
def test_truncated_files(keep, tmp_path):
  path = tmp_path / "m.bin"
  path.write_bytes(_WHOLE[:keep])
  _fails(path, "cut short")


def test_flipped_bits_are_found(tmp_path):
  path = tmp_path / "m.bin"
  start = _WHOLE.index(np.load(_GOLDEN / "torch_state_dict.npz")["single"])
  damaged = bytearray(_WHOLE)
  damaged[start + 5] ^= 1
  path.write_bytes(damaged)
  _fails(path, "'single'", "damaged")
  start = _WHOLE.index(b"ctorch._utils")
  damaged = bytearray(_WHOLE)
  damaged[start] ^= 1
  path.write_bytes(damaged)
  _fails(path)


def test_missing_files_and_other_archives(tmp_path):
  _fails(tmp_path / "none.bin", "missing")
  _fails(tmp_path, "cannot be read")
  with zipfile.ZipFile(tmp_path / "m.bin", "w") as archive:
    archive.writestr("readme.txt", "hello")
  _fails(tmp_path / "m.bin", "no file of PyTorch")
