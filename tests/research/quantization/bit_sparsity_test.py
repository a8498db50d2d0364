"""BBS: the identity, what its columns hold, and what they cost."""

import numpy as np
import pytest

from models.errors import InputError
from research.cost.accelerators import bitvert
from research.quantization import bit_sparsity

# Decibels of the integers of 2 million numbers in channels of 8 bits (notes of
# the method), by columns removed: rounded averaging, zero-point shifting. The
# length of the channels is not told; with 1,024 numbers all eight agree.
KNOWN = {
  ("normal", 2): (30.37, 31.12),
  ("normal", 4): (18.52, 19.67),
  ("t, 5", 2): (28.25, 29.59),
  ("t, 5", 4): (16.63, 18.61),
}


@pytest.fixture(scope="module")
def channels():
  """Integers of 8 bits (256, 1024) of numbers with a scale a channel."""
  rng = np.random.default_rng(0)
  found = {}
  for name in ("normal", "t, 5"):
    shape = 256, 1024
    x = rng.normal(size=shape)
    if name != "normal":
      x = rng.standard_t(5, shape)
    scales = np.abs(x).max(1, keepdims=True) / 127
    found[name] = np.round(x / scales).astype(np.int64)
  return found


def test_sums_by_the_fewer_bits_are_exact():
  rng = np.random.default_rng(1)
  weights = rng.integers(-128, 128, (64, 32))
  inputs = rng.integers(-1000, 1000, 32)
  np.testing.assert_array_equal(
    bit_sparsity.dot(weights, inputs), weights @ inputs
  )
  bits = bit_sparsity.columns(weights)
  powers = np.array([-128, 64, 32, 16, 8, 4, 2, 1]).reshape(8, 1, 1)
  np.testing.assert_array_equal((bits * powers).sum(0), weights)
  # Never more than half, whatever the weights are.
  for extreme in (weights, np.full((2, 32), -1), np.zeros((2, 32), int)):
    assert bit_sparsity.additions(bit_sparsity.columns(extreme)).max() <= 16


@pytest.mark.parametrize("name, removed", list(KNOWN))
def test_errors_are_those_known(name, removed, channels):
  weights = channels[name]
  found = []
  for mode in bit_sparsity.MODES:
    encoded = bit_sparsity.encode(weights, removed, mode)
    noise = np.square(encoded.values.reshape(weights.shape) - weights).sum()
    found.append(10 * np.log10(np.square(weights).sum() / noise))
    # Columns and a byte a group.
    assert encoded.bits == weights.size * (8 - removed + 8 / 32)
    assert encoded.nbytes == encoded.bits // 8
  known = KNOWN[name, removed]
  np.testing.assert_allclose(found, known, rtol=0, atol=0.1)
  assert found[1] - found[0] == pytest.approx(known[1] - known[0], abs=0.1)


@pytest.mark.parametrize("mode", bit_sparsity.MODES)
def test_what_stays_is_what_the_columns_hold(mode, channels):
  weights = channels["normal"][:64]
  groups = weights.reshape(-1, 32)
  for removed in range(5):
    encoded = bit_sparsity.encode(weights, removed, mode)
    left = removed - encoded.copies
    assert np.all(left >= 0) and np.all(encoded.copies <= 3)
    step = (1 << left)[:, None]
    if removed == 0:
      np.testing.assert_array_equal(encoded.values, groups)
    elif mode == "average":
      # Whole high bits of the weights, and low ones that all share.
      np.testing.assert_array_equal(encoded.values // step, groups // step)
      low = encoded.values % step
      np.testing.assert_array_equal(low, encoded.constants[:, None] + 0 * low)
      assert np.all(encoded.constants < step[:, 0])
    else:
      shifted = encoded.values + encoded.constants[:, None]
      assert np.all(shifted % step == 0)
      assert np.all(np.abs(shifted) < (128 >> encoded.copies)[:, None])
      assert np.all(np.abs(encoded.constants) <= 32)


def test_cycles_by_hand():
  engine = bitvert.Lanes(lanes=2, adders=1)
  # Two columns of three groups of four: the third group has a lane alone.
  bits = np.zeros((2, 3, 4), int)
  bits[0, 0, :3] = 1
  bits[0, 1, :2] = 1
  bits[1, 2] = 1
  # By ones: 3, then an idle column; 1 and 4. By the fewer: 2 and 1; 1 and 1.
  assert bitvert.cycles(bits, engine, both_ways=False) == 3 + 1 + 1 + 4
  assert bitvert.cycles(bits, engine) == 2 + 1 + 1 + 1
  assert bitvert.dense_cycles(2, 3, 4, engine) == 2 * 2 * 4
  with pytest.raises(InputError, match="positive"):
    bitvert.Lanes(lanes=0)


def test_bits_are_skipped_both_ways(channels):
  weights = channels["normal"].reshape(-1, 32)
  engine = bitvert.Lanes(lanes=16, adders=4)
  bits = bit_sparsity.columns(weights)
  both = bitvert.cycles(bits, engine)
  ones = bitvert.cycles(bits, engine, both_ways=False)
  dense = bitvert.dense_cycles(8, *weights.shape, engine)
  # The fewer bits of a column are at most half of its group, so they take at
  # most half of the cycles of a dense array.
  assert dense / 2 >= both and ones > 1.2 * both
  # Removed columns need no cycles.
  few = bitvert.cycles(bits[:4], engine)
  assert dense / few > 3.5


def test_sizes_of_the_published_modes():
  """The paper tells 1.29 and 1.66 times fewer bytes of whole networks."""
  conservative = bitvert.bits_a_weight(2, 0.1)
  moderate = bitvert.bits_a_weight(4, 0.2)
  assert conservative == pytest.approx(6.425) and moderate == 5.0
  assert 8 / conservative == pytest.approx(1.29, rel=0.05)
  assert 8 / moderate == pytest.approx(1.66, rel=0.05)
  kept = bit_sparsity.sensitive(np.arange(128.0), 0.1)
  assert kept.sum() == 32 and kept[96:].all()


@pytest.mark.parametrize(
  "change, said",
  [
    ({"removed": 7}, "give 0 to 6"),
    ({"mode": "round"}, "give average or shift"),
    ({"group": 24}, "does not divide"),
    ({"weights": np.full((2, 32), 128)}, "from -127 to 127"),
    ({"weights": np.zeros((2, 32))}, "from -127 to 127"),
  ],
)
def test_what_does_not_go_is_one_line(change, said):
  given = {"weights": np.zeros((2, 32), int), "removed": 2, "mode": "shift"}
  with pytest.raises(InputError, match=said):
    bit_sparsity.encode(**(given | change))
