"""Fourier mixing of FNet: the real part of a 2-D transform, over two axes.

With C_jk = cos(2 pi jk / N), S_jk = sin(2 pi jk / N) of each axis, and real x,

  Re(F_L x F_D) = C_L x C_D - S_L x S_D

A cosine is even about N/2 and a sine odd. So C_L x C_D needs of x what is even
along both axes, the sum of four quadrants, and S_L x S_D what is odd along
both: products of N/2 + 1 by N/2 + 1, an eighth of the operations of whole ones.
All four quadrants of the result are the sum or the difference of the two.
"""

import importlib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.fourier_mix import xla

# "xla" takes the one of the other two that `choose` names; "mosaic_gpu" are the
# products of "xla_dft" between two kernels.
IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.on_one_device(
      dispatch.kernel("ops.fourier_mix.mosaic_gpu", dispatch.needs_hopper)
    ),
    "xla": dispatch.always,
    "xla_fft": dispatch.always,
    "xla_dft": dispatch.always,
  }
)


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
      and the machine, see `choose`. `"mosaic_gpu"` (Hopper; bfloat16, L and D
      multiples of 16 up to where an FFT is faster) is `"xla_dft"` with kernels
      that fold and unfold. None takes the best that runs here.

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
  if name == "mosaic_gpu":
    transform = importlib.import_module("ops.fourier_mix.mosaic_gpu").transform
  else:
    transform = xla.fft if name == "xla_fft" else xla.dft
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
