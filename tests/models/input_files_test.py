import bz2
import gzip
import json
import lzma
import os
import time
import zlib

import pytest

from models import input_files
from models.errors import InputError, reason, shown

_PACKERS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


def _error(call, *args):
  with pytest.raises(InputError) as caught:
    call(*args)
  line = str(caught.value)
  assert "\n" not in line and len(line) <= 1000
  return line


@pytest.mark.parametrize(
  "error",
  [
    RecursionError("deep"),
    zlib.error("invalid block type"),
    lzma.LZMAError("corrupt"),
    EOFError(),
    OverflowError("cannot convert float infinity to integer"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    AttributeError("get"),
    KeyError("src"),
    TypeError("unhashable type"),
    MemoryError(),
    Exception("of a library in Rust"),
  ],
)
def test_every_error_of_a_reader_becomes_one_line(error):
  def read():
    with input_files.errors_at("a.bin", "get it again"):
      raise error

  line = _error(read)
  assert line.startswith("a.bin: is damaged: get it again")
  assert type(error).__name__ in line


def test_a_full_disk_and_ctrl_c_pass():
  for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
    with pytest.raises(type(error)), input_files.errors_at("a.bin"):
      raise error


def test_messages_are_cut_and_values_cheap():
  assert len(str(InputError("x" * 5000))) <= 1000
  assert str(InputError("x" * 5000 + "end")).endswith("end")
  laughs = ()
  for _ in range(100):
    laughs = (laughs, laughs)
  start = time.process_time()
  for value in (laughs, "y" * 10**6, 10**6000, [[]] * 10**5, {"a": laughs}):
    assert len(shown(value)) <= 60
    assert len(reason(KeyError(value))) <= 120
  assert time.process_time() - start < 1


@pytest.mark.parametrize("ending", _PACKERS)
def test_packed_files_are_read_up_to_a_bound(tmp_path, ending):
  path = tmp_path / f"a.txt.{ending}"
  path.write_bytes(_PACKERS[ending]("naïve\n".encode() * 100))
  assert input_files.read_text(path) == "naïve\n" * 100
  path.write_bytes(_PACKERS[ending](bytes(40_000_000)))
  assert "--most_unpacked_mb" in _error(input_files.read_bytes, path)
  with input_files.unpacking(50_000_000):
    assert len(input_files.read_bytes(path)) == 40_000_000


@pytest.mark.parametrize("ending", _PACKERS)
@pytest.mark.parametrize("at", [3, 12, 30])
def test_flipped_and_cut_packed_files_are_told(tmp_path, ending, at):
  path = tmp_path / f"a.{ending}"
  data = bytearray(_PACKERS[ending](os.urandom(200)))
  data[at] ^= 0xFF
  for content in (bytes(data), bytes(data[: at + 4])):
    path.write_bytes(content)
    assert str(path) in _error(input_files.read_text, path)


def test_pipes_devices_and_folders_are_not_opened(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
    assert "no file" in _error(input_files.read_bytes, path)
  assert "missing" in _error(input_files.read_bytes, tmp_path / "none")
  assert "a" in _error(input_files.read_bytes, "a\0b")


@pytest.mark.parametrize(
  "name", ["/etc/passwd", "../x", "a/../../x", "", ".", "a\0b", 7, None, ["x"]]
)
def test_files_do_not_lead_out_of_their_folder(tmp_path, name):
  (tmp_path / "x").write_text("secret")
  folder = tmp_path / "folder"
  folder.mkdir()
  assert "index.json" in _error(input_files.beside, folder / "index.json", name)


@pytest.mark.parametrize(
  "text", ["", "{", "[1]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff"]
)
def test_json_that_is_none_is_told(tmp_path, text):
  path = tmp_path / "a.json"
  path.write_bytes(text.encode("latin-1"))
  for read in (input_files.read_json, input_files.read_kept):
    assert str(path) in _error(read, path)
  path.write_text(json.dumps({"a": 1}))
  assert input_files.read_json(path) == input_files.read_kept(path) == {"a": 1}
