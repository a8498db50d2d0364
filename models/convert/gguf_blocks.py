"""Blocks of GGUF files to float32, in the numbers of ggml (ggml-quants.c).

The package `gguf` knows all formats that llama.cpp writes but the 8-bit one of
256 values, in which it keeps what it multiplies and some tools keep weights.
"""

import gguf
import numpy as np

_Kind = gguf.GGMLQuantizationType
# A float32 scale, 256 int8 values, and 16 sums of them that say nothing more.
_Q8_K = np.dtype([("scale", "<f4"), ("values", "i1", 256), ("sums", "<i2", 16)])


def dequantize(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
  """Values (..., K) of rows of blocks.

  Args:
    data: (..., bytes of a row) uint8; floating-point values of their own type
      are (..., K).
    kind: of the blocks.

  Raises:
    NotImplementedError: the package knows no such blocks.
    ValueError: the bytes are no whole number of blocks.
  """
  if kind != _Kind.Q8_K:
    return gguf.dequantize(data, kind)
  data = np.ascontiguousarray(data, np.uint8)
  blocks = data.reshape(*data.shape[:-1], -1, _Q8_K.itemsize).view(_Q8_K)
  values = blocks["scale"][..., None] * blocks["values"].astype(np.float32)
  return values.reshape(*data.shape[:-1], -1)
