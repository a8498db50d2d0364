"""Bi-directional bit sparsity: integers of 8 bits in fewer columns of bits.

BBS (https://arxiv.org/abs/2409.05227): of the bits of one place of a group of
weights, those that are one select numbers to add, or those that are zero select
numbers to take from the sum of all. So at least half of them need no addition.
Weights are compressed by columns of bits that a group then shares.

Shapes by axis letter: G groups of K weights.
"""

import dataclasses

import numpy as np

from models.errors import InputError

BITS = 8
# Most columns behind the sign that are told to be copies of it, or zero: two
# bits of the eight that a group has beside its columns; six are a constant.
_MOST_COPIES = 3
_CONSTANT = 6
BESIDE = 8
MODES = ("average", "shift")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
  """Groups of weights in few columns of bits.

  Attributes:
    values: (G, K) integers that stand for the weights.
    copies: (G,) columns behind the sign that are copies of it, or zero.
    constants: (G,) the low bits of all, or what was added to all.
    removed: columns that are not kept.
    mode: of `MODES`.
  """

  values: np.ndarray
  copies: np.ndarray
  constants: np.ndarray
  removed: int
  mode: str

  @property
  def bits(self) -> int:
    """All that is kept: columns, and eight bits a group."""
    groups, size = self.values.shape
    return groups * ((BITS - self.removed) * size + BESIDE)

  @property
  def nbytes(self) -> int:
    """Of these bits."""
    return -(-self.bits // 8)


def encode(
  weights: np.ndarray, removed: int, mode: str, *, group: int = 32
) -> Encoded:
  """Compresses integers of 8 bits.

    average   the low bits of all weights become their rounded mean
    shift     a constant is added to all, and magnitudes lose low bits: of 64
              constants the one that leaves the least squared error

  Args:
    weights: (..., S) integers from -127 to 127.
    removed: columns that are not kept, 0 to 6.
    mode: of `MODES`: "average" is the paper's rounded averaging, for few
      columns, "shift" its zero-point shifting.
    group: K, neighbours that share columns; divides S.

  Raises:
    InputError: an argument is out of range.
  """
  weights = np.asarray(weights)
  if mode not in MODES:
    raise InputError(f"mode={mode}: give {' or '.join(MODES)}")
  if not 0 <= removed <= _CONSTANT:
    raise InputError(f"removed={removed}: give 0 to {_CONSTANT}")
  if group < 1 or weights.shape[-1] % group:
    raise InputError(f"group={group}: does not divide {weights.shape[-1]}")
  if not np.issubdtype(weights.dtype, np.integer) or np.any(
    np.abs(weights.astype(np.int64)) > 127
  ):
    raise InputError("weights: give integers from -127 to 127")
  groups = weights.reshape(-1, group).astype(np.int64)
  make = _averaged if mode == "average" else _shifted
  values, copies, constants = make(groups, removed)
  return Encoded(
    values=values,
    copies=copies,
    constants=constants,
    removed=removed,
    mode=mode,
  )


def _averaged(groups, removed):
  """Rounded averaging of the low bits that are left to remove."""
  bits = columns(groups)
  same = np.cumprod(
    [(bits[place] == bits[0]).all(1) for place in range(1, _MOST_COPIES + 1)],
    axis=0,
  )
  copies = np.minimum(same.sum(0), removed)
  mask = (1 << (removed - copies)) - 1
  low = groups & mask[:, None]
  constants = np.minimum(np.floor(low.mean(1) + 0.5).astype(np.int64), mask)
  return groups - low + constants[:, None], copies, constants


def _shifted(groups, removed):
  """Zero-point shifting: the best of all constants."""
  found = None
  for constant in range(-(1 << (_CONSTANT - 1)), 1 << (_CONSTANT - 1)):
    shifted = np.clip(groups + constant, -127, 127)
    sizes = np.abs(shifted)
    top = sizes.max(1)
    copies = sum((top < (1 << (7 - i))).astype(int) for i in range(1, 4))
    copies = np.minimum(copies, removed)
    step = (1 << (removed - copies))[:, None]
    most = (1 << (BITS - 1 - removed)) - 1
    kept = np.minimum((sizes + step // 2) // step, most) * step
    values = np.sign(shifted) * kept - constant
    error = np.square(values - groups).sum(1)
    own = values, copies, np.full(len(groups), constant), error
    if found is None:
      found = own
      continue
    better = error < found[3]
    found = tuple(
      np.where(better[:, None] if a.ndim == 2 else better, a, b)
      for a, b in zip(own, found)
    )
  return found[:3]


def columns(values: np.ndarray) -> np.ndarray:
  """Bits of integers in two's complement, the sign first: (8, ...)."""
  places = np.arange(BITS - 1, -1, -1).reshape(-1, *(1,) * np.ndim(values))
  return (np.asarray(values, np.int64)[None] >> places) & 1


def additions(bits: np.ndarray) -> np.ndarray:
  """Numbers to add or take away for each column (..., K): at most K / 2."""
  ones = bits.sum(-1)
  return np.minimum(ones, bits.shape[-1] - ones)


def dot(weights: np.ndarray, inputs: np.ndarray) -> np.ndarray:
  """A product as the hardware computes it, by columns; exact.

    sum_i w_i a_i = sum_b s_b 2^b (sum of a where the bit is one), or
    (sum of all a) - (sum of a where it is zero), whichever has fewer

  Args:
    weights: (G, K) integers from -128 to 127.
    inputs: (K,) integers.

  Returns:
    (G,) int64.
  """
  inputs = np.asarray(inputs, np.int64)
  total = np.zeros(len(weights), np.int64)
  for place, bits in enumerate(columns(weights)):
    few_ones = 2 * bits.sum(1) <= bits.shape[1]
    by_ones = bits @ inputs
    by_zeros = inputs.sum() - (1 - bits) @ inputs
    power = 1 << (BITS - 1 - place)
    sign = -1 if place == 0 else 1
    total += sign * power * np.where(few_ones, by_ones, by_zeros)
  return total


def sensitive(scales: np.ndarray, share: float, unit: int = 32) -> np.ndarray:
  """Channels that stay whole, those of the largest scales.

  Args:
    scales: (C,) of channels of 8 bits, C a multiple of `unit`.
    share: of the channels, rounded up to whole units.
    unit: channels that hardware takes together.

  Returns:
    (C,) bool.
  """
  count = int(-(-np.ceil(share * len(scales) - 1e-9) // unit) * unit)
  found = np.zeros(len(scales), bool)
  found[np.argsort(-np.asarray(scales), kind="stable")[:count]] = True
  return found
