"""`fourier_mix` in plain JAX: the real part of a 2-D transform.

With C_jk = cos(2 pi jk / N), S_jk = sin(2 pi jk / N) of each axis, and real x,

  Re(F_L x F_D) = C_L x C_D - S_L x S_D

A cosine is even about N/2 and a sine odd. So C_L x C_D needs of x what is even
along both axes, the sum of four quadrants, and S_L x S_D what is odd along
both: products of N/2 + 1 by N/2 + 1, an eighth of the operations of whole ones.
All four quadrants of the result are the sum or the difference of the two.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch

# Halves of long axes are padded to it: rows of bfloat16 begin at 16 bytes.
_MULTIPLE = 8


def fft(x: jax.Array) -> jax.Array:
  """The transform of x, (..., L, D), by a real FFT over D and another over L.

  Of a real x the spectrum at (-k, -d) is the conjugate of that at (k, d).
  """
  exact = jnp.promote_types(x.dtype, jnp.float32)
  half = jnp.fft.rfftn(x.astype(exact), axes=(-2, -1)).real
  rest = _mirrored(half, -1, x.shape[-1])
  # The first token stays where it is, the others turn round.
  rest = jnp.concatenate([rest[..., :1, :], jnp.flip(rest[..., 1:, :], -2)], -2)
  return jnp.concatenate([half, rest], axis=-1).astype(x.dtype)


def dft(x: jax.Array) -> jax.Array:
  """The transform of x, (..., L, D), by products of folded halves."""
  length, channels = x.shape[-2:]
  exact = jnp.promote_types(x.dtype, jnp.float32)
  rows = x.reshape(math.prod(x.shape[:-2]), length, channels)
  both = [
    product(part.astype(x.dtype).transpose(1, 0, 2), x.shape[-2:], odd)
    for odd, part in enumerate(folded(rows.astype(exact)))
  ]
  both = [part.transpose(1, 0, 2).astype(exact) for part in both]
  unfold = _gathered if dispatch.platform() == "gpu" else _joined
  y = unfold(*both, length, channels)
  return y.astype(x.dtype).reshape(x.shape)


def _joined(with_cos, with_sin, length, channels):
  """All four quadrants of (B, L', D'), one beside the other."""
  high, wide = length // 2 + 1, channels // 2 + 1
  with_cos, with_sin = with_cos[:, :high, :wide], with_sin[:, :high, :wide]
  near, far = with_cos - with_sin, with_cos + with_sin
  top = jnp.concatenate([near, _mirrored(far, -1, channels)], axis=-1)
  low = jnp.concatenate([far, _mirrored(near, -1, channels)], axis=-1)
  return jnp.concatenate([top, _mirrored(low, -2, length)], axis=-2)


def _gathered(with_cos, with_sin, length, channels):
  """What `_joined` makes, as what each position finds in the halves.

  On a GPU that is one loop that writes several values at a time, where joined
  quadrants were written one by one and took .166 ms for 64 x 1024 x 1024, whose
  bytes take .04.
  """
  halves = [with_cos, with_sin]
  for axis, size in ((-2, length), (-1, channels)):
    at = np.arange(size, dtype=np.int32)
    at = np.minimum(at, size - at)
    place = (..., at, slice(None)) if axis == -2 else (..., at)
    halves = [half.at[place].get(mode="promise_in_bounds") for half in halves]
  first = [2 * np.arange(size) <= size for size in (length, channels)]
  near = first[0][:, None] == first[1]
  return jnp.where(near, halves[0] - halves[1], halves[0] + halves[1])


def _mirrored(half, axis, size):
  """Of values 0, ..., size // 2 those of size // 2 + 1, ..., size - 1."""
  rest = jax.lax.slice_in_dim(half, 1, size - size // 2, axis=axis)
  return jnp.flip(rest, axis)


def folded(x):
  """What is even, and what is odd along both axes: (..., L', D') each."""
  even = odd = x
  for axis in (-2, -1):
    even, odd = _fold(even, axis, 1), _fold(odd, axis, -1)
  return even, odd


def _fold(x, axis, sign):
  """Adds x_(N-j) to x_j for j up to N/2, and pads to the size of a half.

  Where there is no other, at 0 and at N/2, an odd part is to be zero; but there
  sines are, and it may be anything.
  """
  size, half = x.shape[axis], x.shape[axis] // 2 + 1
  first = jax.lax.slice_in_dim(x, 0, half, axis=axis)
  other = jnp.flip(jax.lax.slice_in_dim(x, half, size, axis=axis), axis)
  after = padded_half(size) - half
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, after)
  first = jnp.pad(first, pads)
  pads[axis] = (1, half - 1 - (size - half) + after)
  return first + sign * jnp.pad(other, pads)


def product(x: jax.Array, sizes: tuple[int, int], odd: int) -> jax.Array:
  """Multiplies a folded half (H, B, W) by cosines or sines from both sides.

  Tokens are summed over first, as the major axis before the batch, and channels
  last, as the minor axis. So each is one large product for the whole batch, and
  nothing is transposed between them. A product sums in float32 and returns x's
  dtype, because float32 would double the bytes that are written and read again.

  Args:
    x: (H, B, W), what is even, or what is odd along both axes.
    sizes: (L, D).
    odd: Which of these it is, 1 or 0.
  """
  options = {"precision": "highest", "preferred_element_type": x.dtype}
  rows, columns = (jnp.asarray(waves(size)[odd], x.dtype) for size in sizes)
  high, batch, wide = x.shape
  y = jnp.matmul(rows, x.reshape(high, batch * wide), **options)
  return jnp.matmul(y.reshape(high, batch, wide), columns, **options)


def padded_half(size: int) -> int:
  """Of positions up to half a size, so many that whole 16 bytes hold them."""
  return -(-(size // 2 + 1) // _MULTIPLE) * _MULTIPLE


@functools.lru_cache(maxsize=8)
def waves(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of 2 pi jk / size, j and k up to size / 2, and zeros."""
  half = size // 2 + 1
  numbers = np.arange(half)
  angles = 2 * np.pi * (np.outer(numbers, numbers) % size) / size
  pads = ((0, padded_half(size) - half),) * 2
  sine = np.sin(angles)
  # Half turns, where NumPy's sine is 1e-16.
  sine[np.outer(2 * numbers, numbers) % size == 0] = 0
  return tuple(np.pad(part, pads) for part in (np.cos(angles), sine))
