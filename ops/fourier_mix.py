"""Fourier mixing of FNet: the real part of a 2-D transform, over two axes.

With C_jk = cos(2 pi jk / N), S_jk = sin(2 pi jk / N) of each axis, and real x,

  Re(F_L x F_D) = C_L x C_D - S_L x S_D

A cosine is even about N/2 and a sine odd. So C_L x C_D needs of x what is even
along both axes, the sum of four quadrants, and S_L x S_D what is odd along
both: products of N/2 + 1 by N/2 + 1, an eighth of the operations of whole ones.
All four quadrants of the result are the sum or the difference of the two.
"""

import functools
import math
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch

# "xla" takes the one of the other two that `choose` names.
IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "xla": dispatch.always,
    "xla_fft": dispatch.always,
    "xla_dft": dispatch.always,
  }
)
# Halves of long axes are padded to it: rows of bfloat16 begin at 16 bytes.
_MULTIPLE = 8


def fourier_mix(
  x: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """Mixes tokens and channels: the real part of the 2-D Fourier transform.

    y_kd = Re sum_{j<L} sum_{c<D} x_jc exp(-2 pi i (jk / L + cd / D))

  of FNet (https://arxiv.org/abs/2105.03824, equation 3), also the mixing of
  FABNet (https://arxiv.org/abs/2209.09570). It is not normalised: values grow
  by sqrt(L D / 2) or so. It is its own transpose, so the gradient of x is
  `fourier_mix` of that of y. The equivalent plain JAX is
  `jnp.fft.fftn(x.astype(jnp.float32), axes=(-2, -1)).real`.

  Args:
    x: (..., L, D), bfloat16 or float32, of any lengths.
    implementation: `"xla_fft"` is a real transform over D and a complex one
      over L, in float32 and rounded once. `"xla_dft"` is four products with
      (L^2 + D^2) / 2 cosines and sines, constants of the program, which take
      L D (L + D) / 2 operations; sums are float32, and what goes into a product
      or comes out of it is of x's dtype. `"xla"` takes one of them by the size
      and the machine, see `choose`. None takes the best that runs here.

  Returns:
    (..., L, D) in x's dtype.

  Raises:
    ValueError: x is not real, or has fewer than two axes or an empty one.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"fourier_mix: x is {x.dtype}, not of a real float dtype")
  if x.ndim < 2 or min(x.shape[-2:]) < 1:
    raise ValueError(f"fourier_mix: x is {x.shape}, not (..., L, D) of tokens")
  name = dispatch.resolve("fourier_mix", IMPLEMENTATIONS, implementation, x)
  if name == "xla":
    name = choose(*x.shape[-2:], x.dtype.itemsize, dispatch.platform())
  # It is its own transpose. JAX has this said of solutions of equations alone,
  # so this is one of the identity, whose gradient is the same call.
  transform = _fft if name == "xla_fft" else _dft
  return jax.lax.custom_linear_solve(
    lambda y: y, x, lambda _, b: transform(b), symmetric=True
  )


def choose(length: int, channels: int, itemsize: int, platform: str) -> str:
  """Returns "xla_dft" where its products take less time than an FFT's passes.

  A value of x takes (L + D) / 2 operations of products and 5 values moved by
  what folds, multiplies and unfolds. An FFT moves some 36 bytes of float32,
  which takes an H200 7.5 ps: as long as 3,700 operations of bfloat16 at 70% of
  its rate, or 200 of float32. These are estimates, as the 2,000 for a TPU are,
  where FNet took products for short sequences. On two CPU cores the FFT was as
  fast at every size from 16 x 16 to 1024 x 64, and up to 2.8 times as fast.
  """
  most = {"gpu": (3700, 200), "tpu": (2000, 2000)}.get(platform, (0, 0))
  fewer = (length + channels) / 2 < most[itemsize > 2]
  return "xla_dft" if fewer else "xla_fft"


def _fft(x):
  """Of a real x the spectrum at (-k, -d) is the conjugate of that at (k, d)."""
  exact = jnp.promote_types(x.dtype, jnp.float32)
  half = jnp.fft.rfftn(x.astype(exact), axes=(-2, -1)).real
  rest = _mirrored(half, -1, x.shape[-1])
  # The first token stays where it is, the others turn round.
  rest = jnp.concatenate([rest[..., :1, :], jnp.flip(rest[..., 1:, :], -2)], -2)
  return jnp.concatenate([half, rest], axis=-1).astype(x.dtype)


def _dft(x):
  length, channels = x.shape[-2:]
  exact = jnp.promote_types(x.dtype, jnp.float32)
  rows = x.reshape(math.prod(x.shape[:-2]), length, channels)
  both = [
    _product(part.astype(x.dtype), x.shape[-2:], odd).astype(exact)
    for odd, part in enumerate(_folded(rows.astype(exact)))
  ]
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


def _folded(x):
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
  after = _half(size) - half
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, after)
  first = jnp.pad(first, pads)
  pads[axis] = (1, half - 1 - (size - half) + after)
  return first + sign * jnp.pad(other, pads)


def _product(x, sizes, odd):
  """Multiplies a folded (B, L', D') by cosines or sines from both sides.

  Tokens are summed over first, as the major axis before the batch, and channels
  last, as the minor axis. So each is one large product for the whole batch, and
  nothing is transposed between them. A product sums in float32 and returns x's
  dtype, because float32 would double the bytes that are written and read again.

  Args:
    x: What is even, or what is odd along both axes.
    sizes: (L, D).
    odd: Which of these it is, 1 or 0.
  """
  options = {"precision": "highest", "preferred_element_type": x.dtype}
  rows, columns = (jnp.asarray(_waves(size)[odd], x.dtype) for size in sizes)
  batch, high, wide = x.shape
  y = x.transpose(1, 0, 2).reshape(high, batch * wide)
  y = jnp.matmul(rows, y, **options).reshape(high, batch, wide)
  return jnp.matmul(y, columns, **options).transpose(1, 0, 2)


def _half(size: int) -> int:
  return -(-(size // 2 + 1) // _MULTIPLE) * _MULTIPLE


@functools.lru_cache(maxsize=8)
def _waves(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines of 2 pi jk / size, j and k up to size / 2, and zeros."""
  half = size // 2 + 1
  numbers = np.arange(half)
  angles = 2 * np.pi * (np.outer(numbers, numbers) % size) / size
  pads = ((0, _half(size) - half),) * 2
  sine = np.sin(angles)
  # Half turns, where NumPy's sine is 1e-16.
  sine[np.outer(2 * numbers, numbers) % size == 0] = 0
  return tuple(np.pad(part, pads) for part in (np.cos(angles), sine))


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
