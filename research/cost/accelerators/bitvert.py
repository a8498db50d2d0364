"""Cycles of BitVert, which skips bits of weights (arXiv:2409.05227).

A lane takes one column of bits of a group of weights at a time, and adds the
inputs that the column selects, by its ones or by its zeros, whichever are
fewer. Lanes that share inputs wait for the slowest of them.

**A reconstruction**: the paper's simulator, with its memories and its order of
channels, is not part of it; arrays of bits give cycles of the lanes alone.
"""

import dataclasses

import numpy as np

from models.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes:
  """What adds.

  Attributes:
    lanes: groups that go side by side, and wait for each other.
    adders: inputs that a lane adds in a cycle.
  """

  lanes: int = 16
  adders: int = 8

  def __post_init__(self):
    """Checks the sizes."""
    if min(self.lanes, self.adders) < 1:
      raise InputError(f"{self}: give positive sizes")


def cycles(
  bits: np.ndarray, engine: Lanes, *, both_ways: bool = True
) -> np.ndarray:
  """Cycles of products with groups of weights.

  Args:
    bits: (..., C, G, K) of columns C and groups G of K weights.
    engine: what adds.
    both_ways: whether zeros select where they are fewer; else ones alone do,
      as in accelerators before.

  Returns:
    (...) int64.
  """
  ones = np.asarray(bits).sum(-1)
  size = bits.shape[-1]
  count = np.minimum(ones, size - ones) if both_ways else ones
  # A column without additions passes in a cycle.
  each = np.maximum(-(-count // engine.adders), 1)
  beyond = -each.shape[-1] % engine.lanes
  pad = [(0, 0)] * (each.ndim - 1) + [(0, beyond)]
  each = np.pad(each, pad).reshape(*each.shape[:-1], -1, engine.lanes)
  return each.max(-1).sum((-1, -2))


def dense_cycles(columns: int, groups: int, size: int, engine: Lanes) -> int:
  """The same where no bit is skipped."""
  waves = -(-groups // engine.lanes)
  return columns * waves * -(-size // engine.adders)


def bits_a_weight(
  removed: int, share: float, *, group: int = 32, bits: int = 8
) -> float:
  """Bits of a weight where a share of the channels stays whole.

  The paper's conservative mode removes 2 columns of all but 10% of channels,
  its moderate mode 4 of all but 20%.
  """
  return share * bits + (1 - share) * (bits - removed + 8 / group)
