"""Fourier mixing in float64."""

import numpy as np


def fourier_mix_reference(x: np.ndarray) -> np.ndarray:
  """The specification in float64, one value at a time.

  x is as in `fourier_mix`.
  """
  x = np.asarray(x, np.float64)
  length, channels = x.shape[-2:]
  y = np.zeros(x.shape)
  for k, d in np.ndindex(length, channels):
    turns = np.add.outer(
      np.arange(length) * k / length, np.arange(channels) * d / channels
    )
    y[..., k, d] = np.sum(x * np.cos(2 * np.pi * turns), axis=(-2, -1))
  return y
