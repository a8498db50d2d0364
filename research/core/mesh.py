"""Device meshes: the batch is split over "data", all else is replicated."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from models.errors import InputError

DATA_AXIS = "data"


def data_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
  """One-axis mesh named "data" over the first `num_devices` devices.

  Args:
    num_devices: how many devices to use; None takes all that are visible.

  Returns:
    A mesh whose axis type is `Auto`: the compiler places what a step computes.

  Raises:
    InputError: fewer devices are visible, or the number is not positive.
  """
  devices = jax.devices()
  count = len(devices) if num_devices is None else num_devices
  if not 1 <= count <= len(devices):
    raise InputError(
      f"{count} devices asked but {len(devices)} visible"
      f" ({devices[0].platform}): ask for 1 to {len(devices)}"
    )
  return jax.make_mesh(
    (count,),
    (DATA_AXIS,),
    axis_types=(AxisType.Auto,),
    devices=devices[:count],
  )


def data_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Sharding that splits the leading axis over the devices of `mesh`."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Sharding that holds a whole copy on every device of `mesh`."""
  return NamedSharding(mesh, PartitionSpec())


def shard_batch[Tree](mesh: jax.sharding.Mesh, batch: Tree) -> Tree:
  """Places a batch with the leading axis of each array split over "data".

  Args:
    mesh: a mesh from `data_mesh`.
    batch: pytree of arrays (B, ...); None and empty trees pass through.

  Returns:
    The same tree as device arrays; arrays that lie right are not copied.

  Raises:
    InputError: a leading axis is absent or does not divide by the devices.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    shape = np.shape(leaf)
    if not shape or shape[0] % mesh.size:
      name = jax.tree_util.keystr(path) or "batch"
      raise InputError(
        f"batch array {name} of shape {shape} cannot be split over"
        f" {mesh.size} devices: make the batch size a multiple of {mesh.size}"
      )
  return jax.device_put(batch, data_sharding(mesh))


def replicate[Tree](mesh: jax.sharding.Mesh, tree: Tree) -> Tree:
  """Places a whole copy of every array of `tree` on every device of `mesh`.

  Arrays that lie so already are returned as they are. On one device the result
  may share memory with the input, so donate only one of them.
  """
  return jax.device_put(tree, replicated_sharding(mesh))


def sum_over_devices(
  function: Callable[..., Any], mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
  """Adds up what every device computes of its rows.

  By hand and not by the compiler, which cannot split a kernel.

  Args:
    function: `(replicated, batch, *more replicated) -> sums`, a pytree.
    mesh: a mesh from `data_mesh`.

  Returns:
    A function of the same arguments, whose result is the sum over the rows of
    all devices.
  """
  if mesh.size == 1:
    return function

  def summed(replicated, batch, *more):
    return jax.lax.psum(function(replicated, batch, *more), DATA_AXIS)

  def call(replicated, batch, *more):
    rest = (PartitionSpec(),) * len(more)
    return jax.shard_map(
      summed,
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec(DATA_AXIS), *rest),
      out_specs=PartitionSpec(),
      # Checks of varying axes are off, because kernels do not say along which
      # axes their results vary.
      check_vma=False,
    )(replicated, batch, *more)

  return call
