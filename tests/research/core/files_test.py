import dataclasses
import os

import numpy as np
import pytest

from models.errors import InputError
from research.core import files


@dataclasses.dataclass(frozen=True)
class _Options:
  rate: float = 0.1
  seed: int = 0


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


def test_an_error_names_the_file_and_not_its_draft(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError) as caught:
    files.write_text(tmp_path / "file" / "a", "x")
  assert str(tmp_path / "file") in str(caught.value.filename)
  assert os.strerror(caught.value.errno)
