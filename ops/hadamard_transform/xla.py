"""`hadamard_transform` in plain JAX: a dense product for each factor."""

import math

import jax
import jax.numpy as jnp

from ops.hadamard_transform.matrices import factors


def forward(x: jax.Array, *, axis: int, inverse: bool) -> jax.Array:
  """Implements `hadamard_transform`; arguments as in `ops`."""
  parts = factors(x.shape[axis])
  axis %= x.ndim
  before, size = math.prod(x.shape[:axis]), x.shape[axis]
  after = math.prod(x.shape[axis + 1 :])
  y = x.reshape(before, size, after)
  for at, part in enumerate(parts):
    # The part's own axis between what lies in front of it and behind it.
    inner = math.prod(len(one) for one in parts[at + 1 :])
    y = y.astype(x.dtype).reshape(-1, len(part), inner * after)
    y = jnp.einsum(
      "aib,ij->ajb",
      y,
      jnp.asarray(part.T if inverse else part, x.dtype),
      precision="highest",
      preferred_element_type=jnp.float32,
    )
  return (y * size**-0.5).astype(x.dtype).reshape(x.shape)
