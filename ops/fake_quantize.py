"""Symmetric per-token fake quantization of activations."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import dispatch

IMPLEMENTATIONS = dispatch.XLA_ONLY

_FULL_BITS = 16


def fake_quantize(
  x: jax.Array,
  bits: jax.Array | int,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Rounds each token to a symmetric grid of `bits` bits and back.

  The grid spans the token's absolute maximum (per-token absmax, as in
  ZeroQuant, https://arxiv.org/abs/2206.01861):

    s = max_d |x_d| / (2^(bits - 1) - 1)
    y_d = s * round(x_d / s)        (halves to even)

  16 bits or more return `x` exactly; a row of zeros stays zero.

  Args:
    x: Activations, (..., D), any float dtype; computed in float32.
    bits: Bits of each token, whole numbers of at least 2 in an int or float
      dtype. A scalar, or an array that broadcasts against `x` without D.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    (..., D) in the dtype of `x`. The gradient is straight-through: that of the
    identity for `x`, none for `bits`.

  Raises:
    ValueError: `bits` is a Python int below 2.
  """
  if isinstance(bits, int) and bits < 2:
    raise ValueError(f"fake_quantize: bits is {bits}, but must be at least 2")
  dispatch.resolve("fake_quantize", IMPLEMENTATIONS, implementation)
  return _fake_quantize(x, bits)


def _fake_quantize(x: jax.Array, bits: jax.Array | int) -> jax.Array:
  bits = jnp.asarray(bits).astype(jnp.int32)
  bits = jnp.broadcast_to(bits, x.shape[:-1])[..., None]
  # Shifts are exact where exp2 is not.
  shift = jnp.clip(bits, 2, _FULL_BITS) - 1
  levels = (lax.shift_left(jnp.ones_like(shift), shift) - 1).astype(jnp.float32)
  wide = lax.stop_gradient(x).astype(jnp.float32)
  scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / levels
  scale = jnp.where(scale > 0, scale, 1.0)
  grid = (jnp.round(wide / scale) * scale).astype(x.dtype)
  # x - stop_gradient(x) is exactly zero, so the value is the grid point.
  straight_through = grid + (x - lax.stop_gradient(x))
  return jnp.where(bits >= _FULL_BITS, x, straight_through)


def fake_quantize_reference(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
  """The specification in float64; arrays as in `fake_quantize`."""
  x = np.asarray(x, np.float64)
  bits = np.broadcast_to(np.asarray(bits), x.shape[:-1])
  out = np.zeros_like(x)
  for token in np.ndindex(*x.shape[:-1]):
    largest = np.max(np.abs(x[token]))
    if bits[token] >= _FULL_BITS or largest == 0:
      out[token] = x[token]
      continue
    scale = largest / (2.0 ** (bits[token] - 1) - 1)
    out[token] = np.round(x[token] / scale) * scale
  return out
