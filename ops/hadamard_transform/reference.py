"""The specification of `hadamard_transform`."""

import numpy as np

from ops.hadamard_transform.matrices import hadamard_matrix


def hadamard_transform_reference(
  x: np.ndarray, *, axis: int = -1, inverse: bool = False
) -> np.ndarray:
  """The product with the whole matrix in float64.

  Arguments as in `hadamard_transform`.
  """
  moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
  matrix = hadamard_matrix(moved.shape[-1]).astype(np.float64)
  rotated = moved @ (matrix.T if inverse else matrix)
  return np.moveaxis(rotated, -1, axis) / moved.shape[-1] ** 0.5
