"""`hadamard_transform`: checks and choice of the implementation."""

import importlib

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.hadamard_transform.matrices import factors

IMPLEMENTATIONS = dispatch.XLA_ONLY


def hadamard_transform(
  x: jax.Array,
  *,
  axis: int = -1,
  inverse: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Rotates an axis by an orthonormal Hadamard matrix.

    y_j = n^(-1/2) sum_i x_i H_ij        inverse: y_i = n^(-1/2) sum_j x_j H_ij

  as QuaRot (https://arxiv.org/abs/2404.00456, section 3) spreads outliers over
  all channels: products x W and (x H)(H^T W) / n are the same, so both sides
  are given to this function, the weight with `axis=-2`. The equivalent plain
  JAX is `x @ hadamard_matrix(n) / n**0.5`.

  Args:
    x: (..., n, ...), bfloat16 or float32.
    axis: That of n: 2^k, or m 2^k with m in 12, 20, 28, 36 and other orders of
      Paley up to 124 (so 40 and 56 too).
    inverse: Whether to rotate back; for n = 2^k it is the same rotation.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    The shape and dtype of x. H is the Kronecker product of few factors of order
    <= 128, each a dense product whose sums are float32; between factors values
    are rounded to x's dtype. So an axis takes O(n) numbers of memory and
    128 n log_128 n multiplications at most. Differentiable.

  Raises:
    ValueError: x is not of a float dtype, or there is no matrix of size n.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"hadamard_transform: x is {x.dtype}, not a float dtype")
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"hadamard_transform: x {x.shape} has no axis {axis}")
  try:
    factors(x.shape[axis])
  except ValueError as error:
    raise ValueError(f"hadamard_transform: {error}") from None
  name = dispatch.resolve(
    "hadamard_transform", IMPLEMENTATIONS, implementation, x
  )
  module = importlib.import_module(f"ops.hadamard_transform.{name}")
  return module.forward(x, axis=axis, inverse=inverse)
