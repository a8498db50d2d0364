"""The specification of `quantized_matmul`."""

import numpy as np

from ops.quantized import QTensor, dequantize


def quantized_matmul_reference(
  x: np.ndarray | QTensor, w: np.ndarray | QTensor
) -> np.ndarray:
  """The product in float64 of what both operands stand for."""
  x, w = (
    np.asarray(
      dequantize(a, dtype="float32") if isinstance(a, QTensor) else a,
      np.float64,
    )
    for a in (x, w)
  )
  # A column lies side by side in memory, which would else be read line by line
  # for each of its numbers.
  w = np.asfortranarray(w)
  out = np.zeros((*x.shape[:-1], w.shape[1]))
  for row in np.ndindex(*x.shape[:-1]):
    for column in range(w.shape[1]):
      out[row][column] = np.sum(x[row] * w[:, column])
  return out
