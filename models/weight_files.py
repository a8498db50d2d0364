"""Parameters of any model as named arrays, and a safetensors file of them."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import files
from models.convert.safetensors_io import SafetensorsFile
from models.errors import InputError
from models.module import Params


def write(path: str | os.PathLike[str], params: Params) -> None:
  """Writes a nested dict of arrays, which keep their dtypes."""
  files.write_safetensors(path, flatten(params))


def read(
  path: str | os.PathLike[str], abstract: Params, dtype: str | None = None
) -> Params:
  """Reads what `write` wrote.

  Args:
    path: of the file.
    abstract: the model's shapes, as its `abstract_params` gives them.
    dtype: of the parameters; None for those of the file.

  Raises:
    InputError: the file is damaged, lacks a tensor, holds an unknown one or
      one of another shape, or a number is not finite.
  """
  file = SafetensorsFile(pathlib.Path(path))
  wanted = shapes(abstract)
  found = set(file.names())
  for name in sorted(found ^ wanted.keys()):
    what = "lacks" if name in wanted else "holds the unknown"
    raise InputError(f"{path}: {what} tensor {name!r}: get the file again")
  flat = {}
  for name, shape in wanted.items():
    if file.shape(name) != shape:
      raise InputError(
        f"{path}: tensor {name!r} has shape {file.shape(name)}, the model "
        f"needs {shape}: get the file again"
      )
    array = file.read(name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise InputError(f"{path}: tensor {name!r} is {array.dtype}")
    if not np.isfinite(array.astype(np.float32)).all():
      raise InputError(f"{path}: tensor {name!r} is not finite")
    flat[name] = jnp.asarray(array, dtype or array.dtype)
  return unflatten(flat)


def shapes(params: Params) -> dict[str, tuple[int, ...]]:
  """Shapes by the names of `flatten`."""
  return {name: leaf.shape for name, leaf in _leaves(params).items()}


def _leaves(tree: Params) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def flatten(params: Params) -> dict[str, np.ndarray]:
  """Parameters by names such as "decoder.attn.q_proj.kernel", on the host."""
  leaves = jax.device_get(_leaves(params))
  return {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}


def unflatten(flat: dict[str, Any]) -> Params:
  """The nested dict that `flatten` was given."""
  tree: Params = {}
  for name, leaf in flat.items():
    *parents, last = name.split(".")
    place = tree
    for parent in parents:
      place = place.setdefault(parent, {})
    place[last] = leaf
  return tree
