"""Hadamard matrices: which sizes there are, and their factors.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. Sylvester doubles
one of order n to order 2n, [[H, H], [H, -H]]; Paley (1933) makes those of

  I   order q + 1    for a prime q = 3 (mod 4)
  II  order 2(q + 1) for a prime q = 1 (mod 4)

from the quadratic residues modulo q. So a size o 2^k, o odd, has one by
doubling that of order 4o: Paley's first has orders 12 and 20, his second 28 and
36.
"""

import functools
import math

import numpy as np

# Width of a factor: matrix units multiply tiles of no more.
WIDEST = 128


@functools.cache
def hadamard_matrix(size: int) -> np.ndarray:
  """The matrix H (size, size) int8, H H^T = size I.

  Raises:
    ValueError: none of that size can be made here.
  """
  odd, base = _parts(size)
  matrix = np.ones((1, 1), np.int8) if odd == 1 else _paley(odd)
  double = np.array([[1, 1], [1, -1]], np.int8)
  for _ in range(int(math.log2(size // base))):
    matrix = np.kron(matrix, double)
  return matrix


@functools.cache
def factors(size: int) -> tuple[np.ndarray, ...]:
  """Few matrices of order <= 128 whose Kronecker product is H of `size`.

  Raises:
    ValueError: there is no such matrix.
  """
  _, base = _parts(size)
  for count in range(1, 64):
    sizes = [base] + [1] * (count - 1)
    while math.prod(sizes) < size:
      sizes[sizes.index(min(sizes))] *= 2
    if max(sizes) <= WIDEST:
      return tuple(hadamard_matrix(one) for one in sizes)
  raise AssertionError(size)


def _parts(size: int) -> tuple[int, int]:
  """The odd part o of a size and the order 1 or 4o that is doubled."""
  odd = size // (size & -size) if size > 0 else 0
  base = 1 if odd == 1 else 4 * odd
  known = odd == 1 or (odd > 1 and base <= WIDEST and _field(odd))
  if not known or size % base:
    raise ValueError(
      f"there is no Hadamard matrix of size {size} here; sizes are 2^k and"
      " m 2^k with m in 12, 20, 28, 36 and other orders of Paley"
    )
  return odd, base


def _field(odd: int) -> int | None:
  """The prime q of Paley's construction of order 4 `odd`."""
  if _is_prime(4 * odd - 1):
    return 4 * odd - 1
  # 2 odd - 1 is 1 modulo 4, as his second construction asks for.
  return 2 * odd - 1 if _is_prime(2 * odd - 1) else None


def _is_prime(number: int) -> bool:
  return number > 1 and all(
    number % d for d in range(2, math.isqrt(number) + 1)
  )


def _paley(odd: int) -> np.ndarray:
  """The matrix of order 4 `odd` > 4."""
  q = _field(odd)
  squares = np.unique(np.arange(1, q) ** 2 % q)
  character = np.where(np.isin(np.arange(q), squares), 1, -1)
  character[0] = 0
  jacobsthal = character[np.subtract.outer(np.arange(q), np.arange(q)) % q]
  side = 1 if q % 4 == 1 else -1
  core = np.block(
    [
      [np.zeros((1, 1), int), np.ones((1, q), int)],
      [side * np.ones((q, 1), int), jacobsthal],
    ]
  )
  one = np.eye(q + 1, dtype=int)
  if side == -1:
    return (one + core).astype(np.int8)
  # The core is symmetric with a zero diagonal, and core^2 = q I.
  whole = np.kron(core, [[1, 1], [1, -1]]) + np.kron(one, [[1, -1], [-1, -1]])
  return whole.astype(np.int8)
