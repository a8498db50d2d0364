"""What processes tell each other, with a fake of what carries it."""

import numpy as np
import pytest
from jax.experimental import multihost_utils

from models.errors import InputError
from research.core import files, processes


class _Wire:
  """Carries arrays from a writer to a process that comes after it."""

  def __init__(self, monkeypatch):
    self._set = monkeypatch.setattr
    self.sent = []
    self._set(processes, "count", lambda: 2)

  def _as(self, writes, carry, function):
    self._set(processes, "is_writer", lambda: writes)
    self._set(multihost_utils, "broadcast_one_to_all", carry)
    return processes.from_writer(function)

  def write(self, function):
    def carry(array):
      # JAX has integers of 32 bits without x64.
      assert np.asarray(array).dtype.itemsize <= 4
      self.sent.append(np.array(array))
      return array

    return self._as(True, carry, function)

  def read(self):
    coming = iter(self.sent)

    def carry(array):
      found = next(coming)
      assert (array.shape, array.dtype) == (found.shape, found.dtype)
      return found

    return self._as(False, carry, pytest.fail)


@pytest.fixture
def wire(monkeypatch):
  return _Wire(monkeypatch)


def test_what_is_large_comes_in_pieces(wire, monkeypatch):
  monkeypatch.setattr(processes, "_PIECE", 7)
  value = {"name": "what a writer has read", "array": np.arange(5)}
  wire.write(lambda: value)
  assert len(wire.sent) > 9 and max(x.size for x in wire.sent) == 7
  found = wire.read()
  assert found["name"] == value["name"]
  np.testing.assert_array_equal(found["array"], value["array"])


@pytest.mark.parametrize("size", [0, 2**31 - 1, 2**31, 5 * 2**30 + 7])
def test_sizes_beyond_32_bits_are_told(monkeypatch, size):
  # Without x64, JAX gives back 32 bits of what it is given.
  narrow = lambda array: np.asarray(array).astype(np.int32)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", narrow)
  assert processes._broadcast_size(size) == size


def test_a_mistake_is_told_everywhere(wire):
  def fail():
    raise InputError("the file is damaged")

  for run in (lambda: wire.write(fail), wire.read):
    with pytest.raises(InputError, match="^the file is damaged$"):
      run()


def test_a_failure_of_the_writer_ends_the_others(wire):
  def fail():
    raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space left"):
    wire.write(fail)
  with pytest.raises(InputError, match=r"failed \(OSError: No space") as told:
    wire.read()
  assert "\n" not in str(told.value)


def test_what_cannot_be_sent_ends_the_others(wire):
  with pytest.raises(Exception, match="pickle"):
    wire.write(lambda: lambda: None)
  with pytest.raises(InputError, match="the process that writes failed"):
    wire.read()


def test_kept_arrays_are_written_where_failures_are_told(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "from_writer", lambda function: None)
  path = tmp_path / "kept.npz"
  made = files.kept(path, "owner", lambda: {"x": np.zeros(2)})
  np.testing.assert_array_equal(made["x"], np.zeros(2))
  assert not path.exists()
