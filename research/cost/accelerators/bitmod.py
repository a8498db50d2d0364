"""Terms, cycles, energy of BitMoD's bit-serial products (arXiv:2411.11745).

A weight is a short sum of signed powers of two; an element multiplies by one
of these terms a cycle. Integers are recoded by Booth (radix 4): 4 terms of 8
bits, 3 of 6. Levels of the 3- and 4-bit float types, and those that blocks
choose, are sums of at most two powers of two. Inputs are float16.

Cycles are those of the terms, and traffic is counted in bytes. **Energies and
the shape of the array are parameters, no measurements**: the published ones
come from synthesis in a 28 nm process that is not at hand.
"""

import dataclasses
from typing import Any

import numpy as np

from models.errors import InputError

# Integers or arrays of them that broadcast with each other.
Sizes = Any
# Terms of a weight, and its bits with scales and choices, in groups of 128. The
# float that a row has beside is left out: over the row's weights, 16 bits in
# the paper, and 32 in `ops.quantized`.
TERMS = {"int8": 4, "int6": 3, "fp4": 2, "fp3": 2}
BITS = {
  "int8": 8.0 + 8 / 128,
  "int6": 6.0 + 8 / 128,
  "fp4": 4.0 + 10 / 128,
  "fp3": 3.0 + 10 / 128,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
  """An array of bit-serial elements.

  Attributes:
    rows: outputs side by side.
    columns: tokens side by side.
    lanes: of the summed axis, in an element.
    bytes_a_cycle: from memory.
    pj_a_term: of a lane that multiplies by a term.
    pj_a_byte: of a byte from memory.
  """

  rows: Sizes = 32
  columns: Sizes = 32
  lanes: Sizes = 4
  bytes_a_cycle: float = 64.0
  pj_a_term: float = 0.1
  pj_a_byte: float = 30.0


def booth(value: int, bits: int) -> list[tuple[int, int]]:
  """Signed digits and exponents of an integer, radix 4: sum digit 2^exponent.

  Raises:
    InputError: so many bits do not hold it.
  """
  if not -(1 << (bits - 1)) <= value < 1 << (bits - 1) or bits % 2:
    raise InputError(f"value={value}: {bits} bits do not hold it by pairs")
  digits = []
  for place in range(0, bits, 2):
    low = (value >> (place - 1)) & 1 if place else 0
    middle, high = (value >> place) & 1, (value >> (place + 1)) & 1
    digits.append((low + middle - 2 * high, place))
  return digits


def powers(level: float) -> list[tuple[int, int]]:
  """A level as a sum of signed powers of two, by its leading ones.

  Raises:
    InputError: it has no finite sum of them above 2^-8.
  """
  sign, rest, found = (-1 if level < 0 else 1), abs(float(level)), []
  while rest:
    exponent = int(np.floor(np.log2(rest)))
    if exponent < -8:
      raise InputError(f"level={level}: is no short sum of powers of two")
    found.append((sign, exponent))
    rest -= 2.0**exponent
  return found


def cycles(
  array: Array, format: str, tokens: Sizes, depth: Sizes, width: Sizes
) -> np.ndarray:
  """Cycles of a product of (tokens, depth) by (depth, width).

  Terms follow each other in an element, while the next weights come from
  memory: whichever takes longer counts.

  Raises:
    InputError: there is no such format.
  """
  tiles = _ceil(tokens, array.columns) * _ceil(width, array.rows)
  work = tiles * _ceil(depth, array.lanes) * _of(TERMS, format)
  loads = _ceil(weight_bytes(format, depth, width), array.bytes_a_cycle)
  return np.maximum(work, loads)


def energy(
  array: Array, format: str, tokens: Sizes, depth: Sizes, width: Sizes
) -> np.ndarray:
  """Picojoules of the same: of terms, and of weights from memory once."""
  macs = np.asarray(tokens, np.float64) * depth * width
  moved = weight_bytes(format, depth, width)
  return macs * _of(TERMS, format) * array.pj_a_term + moved * array.pj_a_byte


def weight_bytes(format: str, depth: Sizes, width: Sizes) -> np.ndarray:
  """Bytes of weights in groups of 128, scales and choices included."""
  size = np.asarray(depth, np.float64) * width
  return size * _of(BITS, format) / 8


def _of(table, format):
  if format not in table:
    raise InputError(f"format={format}: give {', '.join(table)}")
  return table[format]


def _ceil(a: Sizes, b: Sizes) -> np.ndarray:
  return np.ceil(np.asarray(a, np.float64) / b).astype(np.int64)
