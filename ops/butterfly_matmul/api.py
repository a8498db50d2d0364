"""`butterfly_matmul`: checks and choice of the implementation."""

import importlib
import math
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.butterfly_matmul import tuning, xla

# "xla" takes the XLA form that `tuning.choose` names. The kernels for Hopper
# come first where they pay by `tuning.kernels_pay`.
IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "xla": dispatch.always,
    "xla_dense": dispatch.always,
    "xla_merged": dispatch.always,
    "xla_radix2": dispatch.always,
    "mosaic_gpu": dispatch.on_one_device(
      dispatch.kernel("ops.butterfly_matmul.mosaic_gpu", dispatch.needs_wgmma)
    ),
  }
)


def butterfly_matmul(
  x: jax.Array,
  twiddle: jax.Array,
  *,
  out_features: int | None = None,
  increasing_stride: bool = True,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies rows by a butterfly matrix, or by a product of them.

  A butterfly of n = 2^k channels (https://arxiv.org/abs/1903.05895) is k
  stages. That of stride s mixes each pair of channels s apart, the first of
  them at 2 s (p // s) + p % s for p < n/2, by a 2 x 2 matrix of its own:

    (x_first, x_first+s) <- twiddle[stack, block, stage, p] (x_first, x_first+s)

  with s = 1, 2, ..., n/2 if strides increase, else n/2, ..., 2, 1. Strides turn
  from block to block, so two blocks have the form B^T B or B B^T of
  Kaleidoscope matrices (https://arxiv.org/abs/2012.14966). FABNet makes all
  products of a Transformer so (https://arxiv.org/abs/2209.09570). Inputs are
  padded by zeros to n; each stack reads them all, and their outputs are
  concatenated and cut.

  The equivalent plain JAX of one stage of one stack is

    t = twiddle[0, 0, stage].reshape(n // (2 * s), s, 2, 2)
    y = jnp.einsum("gjik,mgkj->mgij", t, x.reshape(-1, n // (2 * s), 2, s))

  Args:
    x: (..., C), bfloat16 or float32, or complex64; n is the power of two of at
      least 2 that is not below C.
    twiddle: (S, K, log2 n, n/2, 2, 2) of S stacks and K blocks, of any float or
      complex dtype; see `init_twiddle`, `fft_twiddle`, `twiddle_shape`.
    out_features: D, at most S n and more than (S - 1) n; by default S n.
    increasing_stride: Whether the first block's strides increase.
    implementation: `"xla_radix2"` runs the stages in float32 and rounds once.
      `"xla_merged"` makes two or three groups of stages products of up to 64
      channels, `"xla_dense"` one product with the whole matrix; both make their
      matrices in float32, and round these and what lies between products to x's
      dtype; sums are float32. `"xla"` takes one of them by counts of operations
      and bytes (`tuning.choose`). `"mosaic_gpu"` (Hopper; bfloat16, a real
      twiddle, n of 128 to 4096) makes the six smallest strides one product of
      blocks of 64 channels and the others sums in registers, in one pass over
      memory a block. None takes the kernels where they run and are faster by
      what an H200 measured (`tuning.kernels_pay`), else "xla".

  Returns:
    (..., D) in x's dtype, in complex64 where x or twiddle is complex. Gradients
    of both, without conjugates; for them is kept what lies between stages or
    products: k arrays of (..., S n) a block by stages, 1 or 2 merged, none
    dense, one by the kernel.

  Raises:
    ValueError: shapes, dtypes or out_features do not fit.
    UnsupportedError: the implementation does not run here, or not at this size.
  """
  out_features = _check(x, twiddle, out_features)
  names, kernels = IMPLEMENTATIONS, "mosaic_gpu"
  sizes = math.prod(x.shape[:-1]), x.shape[-1], out_features, twiddle.shape[1]
  if tuning.kernels_pay(*sizes):
    names = {kernels: names[kernels], **names}
  name = dispatch.resolve("butterfly_matmul", names, implementation, x, twiddle)
  options = {
    "out_features": out_features,
    "increasing_stride": increasing_stride,
  }
  if name == kernels:
    module = importlib.import_module("ops.butterfly_matmul.mosaic_gpu")
    return module.forward(x, twiddle, **options)
  method = name.partition("_")[2] or None
  return xla.forward(x, twiddle, **options, method=method)


def _check(x, twiddle, out_features) -> int:
  op = "butterfly_matmul"
  for name, array in (("x", x), ("twiddle", twiddle)):
    if not jnp.issubdtype(array.dtype, jnp.inexact):
      raise ValueError(f"{op}: {name} is {array.dtype}, not of a float dtype")
  if x.ndim < 1 or x.shape[-1] < 1:
    raise ValueError(f"{op}: x is {x.shape}, not (..., C) with C of at least 1")
  n = tuning.padded(x.shape[-1])
  wanted = (n.bit_length() - 1, n // 2, 2, 2)
  if twiddle.ndim != 6 or twiddle.shape[2:] != wanted or not twiddle.size:
    shape = ", ".join(map(str, wanted))
    raise ValueError(
      f"{op}: twiddle is {twiddle.shape}, not (S, K, {shape}) as x {x.shape},"
      f" padded to {n} channels, needs it"
    )
  most = twiddle.shape[0] * n
  out_features = most if out_features is None else out_features
  if not most - n < out_features <= most:
    raise ValueError(
      f"{op}: out_features is {out_features}, not above {most - n} and at most"
      f" {most}, which {twiddle.shape[0]} stacks of {n} channels make"
    )
  return out_features
