"""Operands of `quantized_matmul` for the tests of its kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from ops import quantize

# One program, where its ops alone would be dozens.
few = jax.jit(quantize, static_argnums=1)


def operands(form, rows, depth, width, activations=None, seed=0):
  """x (M, D), in a format or bfloat16, and w (D, F) in one."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(rows, depth)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(width, depth)), jnp.float32)
  return x if activations is None else few(x, activations), few(w, form).T


def shapes(form, rows, depth, width, activations=None):
  """The shapes of operands, of which the numbers of large ones take seconds."""
  x = jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((width, depth), jnp.float32)
  if activations is not None:
    x = jax.eval_shape(lambda x: quantize(x, activations), x)
  return x, jax.eval_shape(lambda w: quantize(w, form).T, w)
