import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from models import files
from models.errors import is_disk_full


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
    "import os, sys; from models import files\n"
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
  # The text of an error may be one of a file: it must not take minutes.
  assert not is_disk_full(KeyError("9" * 200_000))


def test_a_safetensors_file_has_the_permissions_of_every_other(tmp_path):
  before = os.umask(0o022)
  try:
    files.write_safetensors(
      tmp_path / "a.safetensors", {"x": np.arange(3)}, {"step": "1"}
    )
    files.write_text(tmp_path / "b", "")
  finally:
    os.umask(before)
  modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
  assert modes == {0o644}
  with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
    assert file.metadata() == {"step": "1"}
    np.testing.assert_array_equal(file.get_tensor("x"), [0, 1, 2])
