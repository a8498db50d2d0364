"""The specification of `rms_norm`."""

import numpy as np


def rms_norm_reference(
  x: np.ndarray,
  scale: np.ndarray,
  *,
  gate: np.ndarray | None = None,
  residual: np.ndarray | None = None,
  num_groups: int = 1,
  eps: float,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
  """The specification in float64, one group of one row at a time.

  Arrays are as in `rms_norm`.
  """
  x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
  if residual is not None:
    x = x + np.asarray(residual, np.float64)
  value = x
  if gate is not None:
    gate = np.asarray(gate, np.float64)
    value = x * gate / (1 + np.exp(-gate))
  h = np.zeros(x.shape)
  for row in np.ndindex(*x.shape[:-1]):
    for own in np.split(np.arange(x.shape[-1]), num_groups):
      rms = np.sqrt(np.mean(value[row][own] ** 2) + eps)
      h[row][own] = value[row][own] / rms * scale[own]
  return h if residual is None else (h, x)
