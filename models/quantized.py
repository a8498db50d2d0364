"""Parameters in few bits: which weights of a model get a number format.

A `QTensor` stands in the tree of parameters where the array did: layers,
`bind`, caches and checkpoints take either.
"""

import functools
import re
from typing import Any

import jax

from models.errors import InputError
from models.module import Params
from ops.quantized import Format, QTensor, absmax, formats, quantize
from ops.quantized.quantize import Observer

# The axis that products with a weight sum over, by the last part of its path.
_AXES = {"kernel": -2, "table": -1}
KERNELS = r".*\.kernel"


def quantize_params(
  params: Params,
  format: str | Format,
  where: str = KERNELS,
  *,
  observer: Observer = absmax,
) -> Params:
  """Quantizes weights to the nearest levels of a format.

  Args:
    params: of any model, a nested dict of arrays; layers may be stacked.
    format: as `ops.quantize` takes it: "int8", "int4:32".
    where: regular expression that the whole dotted path of a weight matches,
      such as "layers.mlp.up_proj.kernel"; by default all kernels. What is in a
      format already is left as it is, so that calls for several formats add up.
    observer: of the magnitudes of a block.

  Returns:
    The same tree with a `QTensor` for each such weight, each layer of a stack
    with scales of its own.

  Raises:
    InputError: there is no such format, nothing matches, a match is neither a
      kernel nor a table, or the groups do not divide a weight, which is named.
  """
  try:
    form, pattern = formats.get(format), re.compile(where)
  except (ValueError, re.error) as error:
    raise InputError(str(error)) from None
  matches = 0

  def one(keys, leaf):
    nonlocal matches
    path = ".".join(str(key.key) for key in keys)
    if isinstance(leaf, QTensor) or not pattern.fullmatch(path):
      return leaf
    matches += 1
    axis = _AXES.get(keys[-1].key)
    if axis is None:
      raise InputError(f"{path}: is neither a kernel nor a table")
    run = functools.partial(quantize, format=form, axis=axis, observer=observer)
    for _ in range(leaf.ndim - 2):
      run = jax.vmap(run)
    try:
      return jax.jit(run)(leaf)
    except ValueError as error:
      raise InputError(f"{path}: {error}") from None

  found = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantized)
  if not matches:
    raise InputError(f"no weight matches {where!r}")
  return found


def is_quantized(leaf: Any) -> bool:
  """Whether a leaf, or a node of a tree, is in a number format."""
  return isinstance(leaf, QTensor)
