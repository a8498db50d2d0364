"""Ops on several devices: each works on its own rows, tokens or heads.

A mesh has axes of these names, and `research.core.mesh` makes it. A training
step is traced under it (`jax.sharding.use_abstract_mesh`), and the compiler
places all arrays; but it cannot cut a kernel. So ops run inside of
`jax.shard_map` there, by `over_devices`, on what one device holds.

What a dimension is decides over which axes it is cut: `RULES`. Where no mesh is
set, or each axis has one device, nothing here does anything.
"""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

DATA, FSDP, SEQUENCE, TENSOR = "data", "fsdp", "sequence", "tensor"
# Neighbouring devices are of one tensor group, whose traffic is the heaviest.
AXES = (DATA, FSDP, SEQUENCE, TENSOR)

# What a dimension is -> the axes that it is cut over.
RULES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
  {
    "batch": (DATA, FSDP),
    "length": (SEQUENCE,),
    # Tokens that are independent of each other, as in a loss.
    "tokens": (SEQUENCE, TENSOR),
    "heads": (TENSOR,),
    "vocab": (TENSOR,),
    # The width of what is kept, and not of what is computed.
    "stored": (FSDP,),
    "stored_whole": (FSDP, TENSOR),
  }
)

# Names of dimensions, one each; None is never cut.
type Dims = Sequence[str | None]


def sizes() -> dict[str, int]:
  """Axes of the mesh that is set and has them open, those of one device not."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return {}
  return {name: size for name, size in mesh.shape.items() if size > 1}


def spec(
  dims: Dims, shape: Sequence[int], axes: Mapping[str, int]
) -> PartitionSpec:
  """How an array is cut over axes of the given sizes.

  Args:
    dims: of its last dimensions; those in front are not cut.
    shape: of the array. A dimension that its axes do not divide stays whole.
    axes: sizes by name.
  """
  if len(shape) < len(dims):
    return PartitionSpec()
  lengths = shape[len(shape) - len(dims) :]
  found = [_axes(dim, [n], axes) for dim, n in zip(dims, lengths)]
  if not any(found):
    return PartitionSpec()
  front = [None] * (len(shape) - len(dims))
  return PartitionSpec(*front, *(_entry(names) for names in found))


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
  """Lays `x` (..., its last dimensions) out by them, where a mesh is set."""
  axes = sizes()
  if not axes:
    return x
  return jax.lax.with_sharding_constraint(x, spec(dims, x.shape, axes))


def is_cut(dim: str, *lengths: int) -> bool:
  """Whether dimensions of these lengths, called `dim`, are cut here."""
  return bool(_axes(dim, lengths, sizes()))


def over_devices(
  function: Callable[..., Any],
  arrays: Mapping[str, jax.Array | None],
  dims: Mapping[str, Dims],
  out_dims: Any,
) -> Any:
  """Runs `function(**arrays)` on every device, with what it holds of them.

  Each array that is not cut over an axis is whole along it, and its gradient is
  summed over the devices of this axis.

  Args:
    function: of the arrays by name, those that are None included.
    arrays: by name.
    dims: of every array by name. What is called alike is cut alike: where one
      of these dimensions is not divided by the axes, none is cut.
    out_dims: those of the results, a tree of tuples.
  """
  axes = sizes()
  given = {name: x for name, x in arrays.items() if x is not None}
  lengths: dict[str, list[int]] = {}
  for name, x in given.items():
    for dim, length in zip(dims[name], x.shape, strict=True):
      lengths.setdefault(dim, []).append(length)
  cut = {dim: _axes(dim, found, axes) for dim, found in lengths.items()}
  absent = dict.fromkeys(arrays.keys() - given.keys())

  def specs(of: Dims) -> PartitionSpec:
    return PartitionSpec(*(_entry(cut.get(dim, ())) for dim in of))

  return jax.shard_map(
    lambda own: function(**own, **absent),
    in_specs=({name: specs(dims[name]) for name in given},),
    out_specs=jax.tree.map(
      specs,
      out_dims,
      is_leaf=lambda x: all(isinstance(d, str | None) for d in x),
    ),
    # Checks of varying axes are off, because kernels do not say along which
    # axes their results vary.
    check_vma=False,
  )(given)


def _axes(
  dim: str | None, lengths: Sequence[int], axes: Mapping[str, int]
) -> tuple[str, ...]:
  """Axes that `dim` is cut over: all of its rule that are there, or none."""
  names = tuple(name for name in RULES.get(dim, ()) if axes.get(name, 1) > 1)
  parts = math.prod(axes[name] for name in names)
  return names if all(n % parts == 0 for n in lengths) else ()


def _entry(names: tuple[str, ...]) -> Any:
  return names if len(names) > 1 else (names[0] if names else None)
