"""Parameters in few bits: which weights of a model get a number format.

A `QTensor` or a `QWeight` stands in the tree of parameters where the array did:
layers, `bind`, caches and checkpoints take any of them.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from models.errors import InputError
from models.module import Params
from ops.hadamard_transform import hadamard_transform
from ops.quantized import (
  Format,
  QTensor,
  Quantizer,
  QWeight,
  absmax,
  formats,
  is_quantized,
  quantize,
)
from ops.quantized.quantize import Observer

# The axis that products with a weight sum over, by the last part of its path.
_AXES = {"kernel": -2, "table": -1, "weight": -1}
KERNELS = r".*\.kernel"


def quantize_params(
  params: Params,
  format: str | Format,
  where: str = KERNELS,
  *,
  input: str | Format | None = None,
  hadamard: bool = False,
  observer: Observer = absmax,
) -> Params:
  """Quantizes weights to the nearest levels of a format.

  Args:
    params: of any model, a nested dict of arrays; layers may be stacked.
    format: as `ops.quantize` takes it: "int8", "int4:32".
    where: regular expression that the whole dotted path of a weight matches,
      such as "layers.mlp.up_proj.kernel"; by default all kernels. What is in a
      format already is left as it is, so that calls for several formats add up.
    input: format of what kernels multiply, with scales of each input's own;
      None leaves it as it is.
    hadamard: whether what kernels multiply is rotated, and they with it.
    observer: of the magnitudes of a block.

  Returns:
    The same tree with a `QTensor` for each such weight, or a `QWeight` where
    `input` or `hadamard` is given, each layer of a stack with scales of its
    own.

  Raises:
    InputError: there is no such format, nothing matches, a match is no kernel,
      table or weight of a convolution (or no kernel where `input` or `hadamard`
      is given), or a weight, which is named, has no such groups or no Hadamard
      matrix of its size.
  """
  try:
    form, pattern = formats.get(format), re.compile(where)
    inputs = None
    if input is not None:
      inputs = Quantizer(scales=None, format=formats.get(input))
  except (ValueError, re.error) as error:
    raise InputError(str(error)) from None
  rich = hadamard or inputs is not None
  matches = 0

  def one(keys, leaf):
    nonlocal matches
    path = _dotted(keys)
    if is_quantized(leaf) or not pattern.fullmatch(path):
      return leaf
    matches += 1
    axis = _AXES.get(path.rpartition(".")[2])
    if axis is None:
      raise InputError(f"{path}: is no kernel, table or convolution")
    if rich and axis != -2:
      raise InputError(f"{path}: kernels alone multiply an input of their own")
    try:
      weight = round_to_nearest(
        leaf, form, axis=axis, observer=observer, hadamard=hadamard
      )
    except ValueError as error:
      raise InputError(f"{path}: {error}") from None
    if not rich:
      return weight
    return QWeight(weight=weight, input=inputs, hadamard=hadamard)

  found = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantized)
  if not matches:
    raise InputError(f"no weight matches {where!r}")
  return found


def has_weights(params: Params, where: str) -> bool:
  """Whether some weight that is not quantized matches `where`, as above."""
  paths = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
  return any(
    re.fullmatch(where, _dotted(keys))
    for keys, leaf in paths
    if not is_quantized(leaf)
  )


def _dotted(keys) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator=".")


@functools.partial(
  jax.jit, static_argnames=("form", "axis", "observer", "hadamard")
)
def round_to_nearest(
  weight: jax.Array,
  form: Format,
  *,
  axis: int = -2,
  observer: Observer = absmax,
  hadamard: bool = False,
) -> QTensor:
  """Each value of a weight as its nearest level.

  Args:
    weight: (..., D, F); leading axes are stacked layers, each with scales of
      its own.
    form: of the result.
    axis: that products with the weight sum over.
    observer: of the magnitudes of a block.
    hadamard: whether the weight is rotated along `axis` before.

  Raises:
    ValueError: the format's groups do not divide the axis, or there is no
      Hadamard matrix of its size.
  """
  values = weight
  if hadamard:
    values = hadamard_transform(values.astype(jnp.float32), axis=axis)
  run = lambda x: quantize(x, form, axis=axis, observer=observer)
  for _ in range(values.ndim - 2):
    run = jax.vmap(run)
  return dataclasses.replace(run(values), dtype=weight.dtype)
