"""Rotations of a model that leave its function as it is.

The norm of a layer commutes with a rotation of the residual stream once its
weights are folded into the kernels that read it; then all that writes to the
stream is rotated, and all that reads it back (QuaRot, arXiv:2404.00456, section
4; SliceGPT, arXiv:2401.15024, theorem 1). Kernels are (D, F) with layers in
front.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import language_model
from models.errors import InputError
from models.module import Params
from ops.hadamard_transform import hadamard_transform
from ops.quantized import QWeight
from research.quantization import structure

_EXACT = jax.lax.Precision.HIGHEST


def fold_norms(
  config: language_model.Config, params: Params
) -> tuple[language_model.Config, Params]:
  """Multiplies the weights of norms into the kernels that read them.

  The head gets weights of its own, since a table that is shared cannot take
  those of the last norm.

  Raises:
    InputError: layers norm what they write to the stream, by weights that do
      not commute with a rotation of it.
  """

  def fold(layer):
    if any(structure.has(layer, norm) for norm in structure.BEHIND):
      raise InputError(
        "layers have norms behind attention and MLP, as Gemma 3 has, whose "
        "weights do not commute with a rotation: take a recipe without one"
      )
    for norm, kernels in structure.readers(layer):
      scale = structure.at(layer, norm)["scale"]
      for path in kernels:
        by_row = lambda w, s=scale: w * s[..., None].astype(w.dtype)
        layer = structure.update(layer, (*path, "kernel"), by_row)
      layer = structure.update(layer, (*norm, "scale"), jnp.ones_like)
    return layer

  params = structure.map_stacks(config, params, fold)
  if config.tie_embeddings:
    config = dataclasses.replace(config, tie_embeddings=False)
    kernel = params["embed"]["table"].T
  else:
    kernel = params["lm_head"]["kernel"]
  scale = params["final_norm"]["scale"]
  return config, params | {
    "lm_head": {"kernel": kernel * scale[:, None].astype(kernel.dtype)},
    "final_norm": {"scale": jnp.ones_like(scale)},
  }


def rotate_stream(
  config: language_model.Config, params: Params, rotation: jax.Array
) -> Params:
  """Rotates the residual stream.

  Args:
    config: of the model, without norm weights (`fold_norms`).
    params: of the model.
    rotation: (D, D), orthogonal.
  """
  wide = rotation.astype(jnp.float32)
  dot = lambda a, b: jnp.matmul(a, b, precision=_EXACT)
  after = lambda w: dot(w.astype(jnp.float32), wide).astype(w.dtype)
  before = lambda w: dot(wide.T, w.astype(jnp.float32)).astype(w.dtype)

  def rotate(layer):
    for _, kernels in structure.readers(layer):
      for path in kernels:
        layer = structure.update(layer, (*path, "kernel"), before)
    for path in structure.writers(layer):
      layer = structure.update(layer, (*path, "kernel"), after)
    return layer

  params = structure.map_stacks(config, params, rotate)
  params = structure.update(params, ("embed", "table"), after)
  return structure.update(params, ("lm_head", "kernel"), before)


def hadamard(size: int) -> jax.Array:
  """The orthonormal Hadamard matrix (D, D).

  Raises:
    InputError: there is none of this size.
  """
  try:
    return hadamard_transform(jnp.eye(size, dtype=jnp.float32))
  except ValueError as error:
    raise InputError(
      f"{error}: take a recipe without rotations for a width of {size}"
    ) from error


def principal(gram: jax.Array) -> jax.Array:
  """Eigenvectors (D, D) of a sum of x x^T, the largest value first.

  The Karhunen-Loeve transform: behind it channels are uncorrelated.
  """
  return jnp.linalg.eigh((gram + gram.T) / 2)[1][:, ::-1]


def rotate_inputs(config: language_model.Config, params: Params) -> Params:
  """Lets kernels that write to the stream rotate what they are given.

  One whose input has a size without a Hadamard matrix is left as it is.
  """

  def rotate(layer):
    for path in structure.writers(layer):
      layer = structure.update(layer, (*path, "kernel"), _rotated)
    return layer

  return structure.map_stacks(config, params, rotate)


def _rotated(kernel: jax.Array) -> QWeight | jax.Array:
  try:
    turned = hadamard_transform(kernel.astype(jnp.float32), axis=-2)
  except ValueError:
    return kernel
  return QWeight(weight=turned.astype(kernel.dtype), input=None, hadamard=True)


def plain_kernel(kernel: Any) -> jax.Array:
  """The array of a kernel that may be rotated."""
  return kernel.weight if isinstance(kernel, QWeight) else kernel
