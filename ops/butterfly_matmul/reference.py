"""The specification of `butterfly_matmul`."""

import numpy as np


def butterfly_matmul_reference(
  x: np.ndarray,
  twiddle: np.ndarray,
  *,
  out_features: int | None = None,
  increasing_stride: bool = True,
) -> np.ndarray:
  """One pair of channels at a time, in float64 or complex128.

  Arguments as in `butterfly_matmul`.
  """
  dtype = np.result_type(x, twiddle, np.float64)
  stacks, blocks, stages, half = np.shape(twiddle)[:4]
  features = np.shape(x)[-1]
  outputs = []
  for stack in range(stacks):
    y = np.zeros((*np.shape(x)[:-1], 2 * half), dtype)
    y[..., :features] = x
    increasing = increasing_stride
    for block in range(blocks):
      for stage in range(stages):
        stride = 2 ** (stage if increasing else stages - 1 - stage)
        for pair in range(half):
          first = pair // stride * 2 * stride + pair % stride
          own = [first, first + stride]
          y[..., own] = y[..., own] @ twiddle[stack, block, stage, pair].T
      increasing = not increasing
    outputs.append(y)
  return np.concatenate(outputs, axis=-1)[..., :out_features]
