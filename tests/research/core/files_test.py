import dataclasses
import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from models.errors import InputError, is_disk_full
from research.core import files


@dataclasses.dataclass(frozen=True)
class _Options:
  rate: float = 0.1
  seed: int = 0


def _names(folder):
  return sorted(path.name for path in folder.rglob("*"))


def test_a_file_is_replaced_as_a_whole(tmp_path):
  path = tmp_path / "new" / "a.json"
  files.write_json(path, {"a": 1})
  with pytest.raises(ValueError):
    files.write_json(path, {"a": float("nan")})
  with pytest.raises(RuntimeError), files.whole(path) as draft:
    draft.write_text("half")
    raise RuntimeError
  assert path.read_text() == '{\n  "a": 1\n}\n'
  files.write_text(path, "é")
  assert path.read_bytes() == b"\xc3\xa9"
  assert _names(tmp_path) == ["a.json", "new"]


def test_a_folder_appears_as_a_whole_and_replaces_none(tmp_path):
  place = tmp_path / "model"
  with pytest.raises(RuntimeError), files.whole_folder(place) as draft:
    (draft / "a").write_text("half")
    raise RuntimeError
  assert not _names(tmp_path)
  with files.whole_folder(place) as draft:
    (draft / "a").write_text("1")
  with pytest.raises(FileExistsError), files.whole_folder(place) as draft:
    (draft / "a").write_text("2")
  assert (place / "a").read_text() == "1"
  assert _names(tmp_path) == ["a", "model"]


def test_a_killed_process_leaves_a_draft_that_is_cleared_away(tmp_path):
  program = (
    "import os, sys; from research.core import files\n"
    "with files.whole(sys.argv[1]) as draft:\n"
    "  draft.write_text('half'); os.kill(os.getpid(), 9)"
  )
  path = tmp_path / "sub" / "a.npz"
  done = subprocess.run([sys.executable, "-c", program, str(path)])
  assert done.returncode == -9
  assert not path.exists() and not list(path.parent.glob("*.npz"))
  with files.whole_folder(tmp_path / "b") as draft:
    files.remove_drafts(tmp_path / "sub")
    assert draft.exists()
  assert _names(tmp_path) == ["b", "sub"]


def test_kept_arrays_are_made_once_and_only_for_what_they_belong_to(tmp_path):
  path, calls = tmp_path / "x.npz", []

  def make():
    calls.append(1)
    return {"x": np.arange(3.0)}

  owner = {"options": _Options(), "data": np.arange(4)}
  for _ in range(2):
    found = files.kept(path, owner, make)
    assert found.keys() == {"x"} and found["x"].tolist() == [0, 1, 2]
  assert len(calls) == 1
  with pytest.raises(InputError, match=r"x.npz: was made for other options"):
    files.kept(path, owner | {"options": _Options(seed=1)}, make)


@pytest.mark.parametrize(
  "spoil",
  [
    lambda data: data[: len(data) // 2],
    lambda data: data[:70] + bytes([data[70] ^ 1]) + data[71:],
    lambda data: b"",
    lambda data: b"no archive",
    lambda data: b"\x93NUMPY\x01\x00",
  ],
)
def test_kept_arrays_that_are_damaged_are_found_out(tmp_path, spoil):
  path = tmp_path / "x.npz"
  files.write_npz(path, {"x": np.arange(30)})
  path.write_bytes(spoil(path.read_bytes()))
  with pytest.raises(InputError, match=r"x.npz: is damaged: remove it"):
    files.read_npz(path)


def test_a_lone_array_is_no_archive(tmp_path):
  np.save(tmp_path / "x.npy", np.arange(3))
  with pytest.raises(InputError, match="is damaged"):
    files.read_npz(tmp_path / "x.npy")


def test_digest_tells_values_and_not_their_order_of_keys_apart():
  same = [{"a": 1, "b": [2.0, None]}, {"b": (2.0, None), "a": 1}]
  assert files.digest(same[0]) == files.digest(same[1])
  different = [
    1, 1.0, "1", True, None, [], [[]], {"a": 1}, _Options(), _Options(seed=1),
    np.zeros(2), np.zeros((2, 1)), np.zeros(2, np.float32), ["a", "b"], ["ab"],
    np.array(["x"], object), np.array(["y"], object),
  ]  # fmt: skip
  assert len({files.digest(value) for value in different}) == len(different)
  with pytest.raises(TypeError):
    files.digest(object())


def test_every_writer_that_meets_a_full_disk_says_so_and_names_the_file(
  tmp_path,
):
  """/dev/full stands for the draft: every write to it fails."""

  def numpy_save(draft):
    with draft.open("wb") as stream:
      np.savez(stream, x=np.zeros(1 << 16))

  def short_write(draft):
    raise OSError("65536 requested and 4096 written")

  def quota(draft):
    raise OSError(errno.EDQUOT, "Disk quota exceeded", str(draft))

  def tensors(draft):
    safetensors.numpy.save_file({"x": np.zeros(1 << 16)}, draft)

  def orbax(draft):
    raise ValueError(
      "RESOURCE_EXHAUSTED: Error writing: No space left on device"
    )

  path = tmp_path / "a"
  for write in (numpy_save, short_write, quota, tensors, orbax):
    with pytest.raises(OSError) as caught, files.whole(path) as draft:
      if write is not tensors:
        draft.symlink_to("/dev/full")
        write(draft)
      else:
        raise RuntimeError(
          'IoError(Os { code: 28, kind: StorageFull, message: "..." })'
        )
    assert is_disk_full(caught.value), write
    assert caught.value.filename == str(path), write
    assert not list(tmp_path.iterdir())
  assert not is_disk_full(ValueError("RESOURCE_EXHAUSTED: out of memory"))


def test_an_error_names_the_file_and_not_its_draft(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError) as caught:
    files.write_text(tmp_path / "file" / "a", "x")
  assert str(tmp_path / "file") in str(caught.value.filename)
  assert os.strerror(caught.value.errno)
