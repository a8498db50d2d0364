"""The hybrid systolic array for MXINT4 weights (HSA, arXiv:2507.09010).

Weights are integers of 4 bits in blocks of 32 that share a power of two. So a
block's sum is one of integers, and dequantizing it is a shift by its exponent
when it enters the accumulator: `product` computes so, exactly.

An array of R x C elements multiplies many tokens as any systolic array does.
With one token a plain array has work for one of its rows; the hybrid one feeds
weights to all rows, and adds up what they give. **Cycles are a reconstruction**
from the abstract: fused norms, rotations and memories are left out, and an
area is a parameter.
"""

import dataclasses
from typing import Any

import numpy as np

from models.errors import InputError

# Integers or arrays of them that broadcast with each other.
Sizes = Any
BLOCK = 32
# Of codes, with an exponent of 8 bits a block.
BITS = 4 + 8 / BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
  """The accelerator.

  Attributes:
    rows: R.
    columns: C.
    hybrid: whether one token's products use all rows.
    clock_mhz: of the array.
    gigabytes: from memory, a second.
    area_mm2: of the chip.
  """

  rows: Sizes = 32
  columns: Sizes = 32
  hybrid: bool = True
  clock_mhz: float = 500.0
  gigabytes: float = 100.0
  area_mm2: float = 1.0


def product(
  inputs: np.ndarray, codes: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, int]:
  """Multiplies integers by MXINT4 weights, in integers alone.

  Args:
    inputs: (M, D) integers of 8 bits.
    codes: (F, D) integers from -7 to 7.
    exponents: (F, D / 32) integers; they span less than 32.

  Returns:
    (M, F) int64 y and a power p: the product is y 2^p exactly.

  Raises:
    InputError: shapes or numbers do not fit.
  """
  inputs, codes = (np.asarray(a, np.int64) for a in (inputs, codes))
  exponents = np.asarray(exponents, np.int64)
  depth = codes.shape[1]
  if depth % BLOCK or exponents.shape != (len(codes), depth // BLOCK):
    raise InputError(
      f"exponents {exponents.shape}: give one for {BLOCK} of codes"
      f" {codes.shape}"
    )
  if inputs.shape[1] != depth or np.abs(codes).max(initial=0) > 7:
    raise InputError("codes: give 4-bit integers, as many as the inputs")
  least = int(exponents.min()) if exponents.size else 0
  if exponents.max(initial=least) - least >= 32:
    raise InputError("exponents: span 32 or more, which no accumulator holds")
  total = np.zeros((len(inputs), len(codes)), np.int64)
  for block in range(depth // BLOCK):
    own = slice(block * BLOCK, (block + 1) * BLOCK)
    partial = inputs[:, own] @ codes[:, own].T
    # The exponent is added where the sum enters the accumulator.
    total += partial << (exponents[:, block] - least)[None]
  return total, least


def cycles(
  array: Array, tokens: Sizes, depth: Sizes, width: Sizes
) -> np.ndarray:
  """Cycles of a product (tokens, depth) by (depth, width), weights at hand.

  A systolic pass takes the summed axis, and R + C - 2 to fill and drain. One
  token of the hybrid mode takes R C products a cycle, and log2(R) to add up.
  """
  rows, columns = np.asarray(array.rows), np.asarray(array.columns)
  tiles = _ceil(tokens, rows) * _ceil(width, columns)
  systolic = tiles * (np.asarray(depth) + rows + columns - 2)
  if not array.hybrid:
    return systolic
  vectors = np.asarray(tokens) * _ceil(width, columns) * _ceil(depth, rows)
  vectors = vectors + np.ceil(np.log2(rows)).astype(np.int64)
  return np.minimum(systolic, vectors)


def utilisation(
  array: Array, tokens: Sizes, depth: Sizes, width: Sizes
) -> np.ndarray:
  """Share of elements that multiply, of those there are."""
  macs = np.asarray(tokens, np.float64) * depth * width
  elements = np.asarray(array.rows) * array.columns
  return macs / (elements * cycles(array, tokens, depth, width))


def tokens_per_second(array: Array, weights: Sizes) -> np.ndarray:
  """Tokens a second of one text whose model has so many weights.

  The slower of the array, at the utilisation of one token, and of memory, from
  which each weight comes once a token.
  """
  weights = np.asarray(weights, np.float64)
  busy = np.asarray(array.rows) * array.columns
  if not array.hybrid:
    busy = np.asarray(array.columns)
  computed = array.clock_mhz * 1e6 * busy / weights
  loaded = array.gigabytes * 1e9 / (weights * BITS / 8)
  return np.minimum(computed, loaded)


def per_area(array: Array, weights: Sizes) -> np.ndarray:
  """Tokens a second and square millimetre."""
  return tokens_per_second(array, weights) / array.area_mm2


def _ceil(a: Sizes, b: Sizes) -> np.ndarray:
  return -(-np.asarray(a, np.int64) // np.asarray(b, np.int64))
