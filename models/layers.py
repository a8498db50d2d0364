"""Layers shared by the models: Linear, RMSNorm, rotary embedding.

Shapes by axis letter: `...` any leading axes, D width, F output width,
H heads, K head dimension. Parameters are kept in their own dtype and cast to
the dtype of the activations; normalisation and rotation run in float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ops.rms_norm import rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Llama-3 frequency scaling of rotary embeddings (Llama 3.1 report).

  Attributes:
    factor: how much low frequencies are slowed down.
    low_freq_factor: wavelengths above `original_max_position /
      low_freq_factor` are scaled by `factor`.
    high_freq_factor: wavelengths below `original_max_position /
      high_freq_factor` are kept.
    original_max_position: context length of the original training.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position: int


class Linear(nnx.Module):
  """`x @ kernel (+ bias)`, kernel (D, F) in its own dtype.

  Attributes:
    kernel: (D, F).
    bias: (F,) or None.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = False,
    rngs: nnx.Rngs,
  ):
    """Truncated-normal kernel of variance 1/D, zero bias."""
    init = jax.nn.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features)))
    self.bias = nnx.Param(jnp.zeros((out_features,))) if use_bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., D) to (..., F)."""
    y = jnp.matmul(x, self.kernel[...].astype(x.dtype))
    if self.bias is None:
      return y
    return y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis (Zhang & Sennrich 2019, eq. 4).

  Attributes:
    scale: (D,).
  """

  def __init__(self, features: int, *, eps: float):
    """Unit scale."""
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((features,)))

  def __call__(self, x: jax.Array, **options) -> jax.Array:
    """Normalises (..., D) in float32, returns the dtype of `x`.

    Takes the options of `ops.rms_norm`.
    """
    return rms_norm(x, self.scale[...], eps=self.eps, **options)


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
  """Angular frequencies (head_dim / 2,) in radians per position, float32.

  Source: RoFormer (Su et al. 2021), eq. 15; Llama-3 scaling as in the
  Llama 3.1 release (smooth interpolation between kept and scaled bands).
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  frequency = theta**-exponent
  if scaling is None:
    return frequency.astype(np.float32)
  wavelength = 2 * math.pi / frequency
  low = scaling.original_max_position / scaling.low_freq_factor
  high = scaling.original_max_position / scaling.high_freq_factor
  smooth = (
    scaling.original_max_position / wavelength - scaling.low_freq_factor
  ) / (scaling.high_freq_factor - scaling.low_freq_factor)
  smooth = np.clip(smooth, 0.0, 1.0)
  smooth = np.where(wavelength > low, 0.0, smooth)
  smooth = np.where(wavelength < high, 1.0, smooth)
  scaled = (1 - smooth) * frequency / scaling.factor + smooth * frequency
  return scaled.astype(np.float32)


def apply_rope(
  x: jax.Array, positions: jax.Array, frequencies: np.ndarray
) -> jax.Array:
  """Rotates (..., H, K) by `positions` (...), half-split convention.

  The first half of K pairs with the second half (Hugging Face layout), not
  even with odd lanes.
  """
  angles = positions[..., None, None].astype(jnp.float32) * frequencies.reshape(
    (1,) * (positions.ndim + 1) + (-1,)
  )
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)
