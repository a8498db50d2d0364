"""Comparisons of arrays that may be complex."""

import numpy as np

from tests.ops.sequence_op import assert_close


def wide(array):
  """The same numbers in float64 or complex128."""
  kind = np.complex128 if np.iscomplexobj(array) else np.float64
  return np.asarray(array).astype(kind)


def assert_alike(found, exact, limit):
  """Compares real parts, and imaginary ones where there are any."""
  for part in (np.real, np.imag):
    if np.iscomplexobj(exact) or part is np.real:
      assert_close(part(wide(found)), part(exact), limit)
