"""Meshes of devices, and what lies where on them.

There is one way onto several devices for every trainer. A mesh has the axes
"data", "fsdp", "sequence" and "tensor" (`mesh_shape.AXES`). A batch is cut by
its rows over the first two; parameters, and an optimizer's state of them, as
their names say (`models.placement`); everything else is whole on every device.
A function is traced under the mesh (`traced`), where models and ops lay out
what they compute, and the compiler does the rest: one device and many compute
the same, up to the order of sums.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from models import placement
from models.errors import InputError
from ops import sharding
from research.core import mesh_shape, processes

Mesh = jax.sharding.Mesh

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all",
                "collective-permute")  # fmt: skip


def make(
  shape: Mapping[str, int] | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over the first devices.

  Args:
    shape: sizes by axis; None splits batches over all devices.
    devices: those there are; None takes all that are visible.

  Returns:
    A mesh whose axis types are `Auto`: the compiler places what is computed.

  Raises:
    InputError: there are fewer devices, or a process of the run has none.
  """
  devices = jax.devices() if devices is None else devices
  shape = {sharding.DATA: len(devices)} if shape is None else dict(shape)
  count = math.prod(shape.values())
  if not 1 <= count <= len(devices):
    raise InputError(
      f"--mesh={mesh_shape.words(shape)} asks for {count} devices, but"
      f" {len(devices)} are visible ({devices[0].platform}): ask for 1 to"
      f" {len(devices)}"
    )
  # A process without a device of the mesh would wait for the others for ever.
  idle = set(range(processes.count()))
  idle -= {device.process_index for device in devices[:count]}
  if idle:
    raise InputError(
      f"--mesh={mesh_shape.words(shape)} takes {count} of {len(devices)}"
      f" devices, and process {min(idle)} has none of them: ask for all, or"
      " start fewer processes"
    )
  names = [name for name in sharding.AXES if name in shape]
  return jax.make_mesh(
    tuple(shape[name] for name in names),
    tuple(names),
    axis_types=(AxisType.Auto,) * len(names),
    devices=devices[:count],
  )


def data_mesh(num_devices: int | None = None) -> Mesh:
  """A mesh that splits batches over the first `num_devices` devices, or all."""
  return make(None if num_devices is None else {sharding.DATA: num_devices})


def row_parts(mesh: Mesh) -> int:
  """Into how many parts a batch is cut."""
  sizes = dict(mesh.shape)
  return math.prod(sizes.get(n, 1) for n in sharding.RULES["batch"])


def check_batch(mesh: Mesh, batch: int, accumulate: int = 1) -> None:
  """Checks that a batch can be cut.

  Raises:
    InputError: its parts of rows, or those of `accumulate`, are not whole.
  """
  parts = row_parts(mesh)
  if batch % (parts * accumulate):
    also = f" times --accumulate={accumulate}" if accumulate > 1 else ""
    raise InputError(
      f"--batch={batch} is no multiple of {parts} parts of rows{also}: change"
      " one, or data and fsdp of --mesh"
    )


def check_length(mesh: Mesh, length: int, what: str = "--length=") -> None:
  """Checks that rows of `length` tokens can be cut.

  Args:
    mesh: the devices.
    length: tokens.
    what: stands in front of the length where it does not do.

  Raises:
    InputError: the parts would differ.
  """
  parts = dict(mesh.shape).get(sharding.SEQUENCE, 1)
  if length % parts:
    raise InputError(
      f"{what}{length} is no multiple of sequence:{parts}: change one"
    )


def check_no_sequence(mesh: Mesh) -> None:
  """Checks that a mesh does not cut tokens, for models that cannot.

  Raises:
    InputError: it does.
  """
  parts = dict(mesh.shape).get(sharding.SEQUENCE, 1)
  if parts > 1:
    raise InputError(
      f"--mesh: sequence:{parts} cuts nothing of these models: take"
      f" data:{parts}"
    )


def check_used(mesh: Mesh, params: Any) -> None:
  """Checks that a mesh has no axis that cuts nothing of a model.

  Raises:
    InputError: it has one.
  """
  sizes = _sizes(mesh)
  specs = jax.tree.leaves(placement.stored_specs(params, sizes))
  used = {name for spec in specs for name in _names(spec)}
  for name in (sharding.FSDP, sharding.TENSOR):
    if name in sizes and name not in used:
      raise InputError(
        f"--mesh: {name}:{sizes[name]} divides no array of this model: take"
        f" another number of devices, or data:{sizes[name]}"
      )


def _names(spec: PartitionSpec) -> set[str]:
  entries = (e if isinstance(e, tuple) else (e,) for e in spec)
  return {name for entry in entries for name in entry if name}


def _sizes(mesh: Mesh) -> dict[str, int]:
  return {name: size for name, size in mesh.shape.items() if size > 1}


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding that splits the leading axis, the rows."""
  names = tuple(n for n in sharding.RULES["batch"] if n in mesh.shape)
  return NamedSharding(mesh, PartitionSpec(names) if names else PartitionSpec())


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding that holds a whole copy on every device of `mesh`."""
  return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, tree: Any) -> Any:
  """Where every array of a tree lies, by its name.

  Args:
    mesh: the devices.
    tree: arrays or shapes: parameters, a `TrainState`, or anything else.
  """
  specs = placement.stored_specs(tree, _sizes(mesh))
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def abstract(mesh: Mesh, tree: Any) -> Any:
  """Shapes of a tree with `shardings`, to lower a function for."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings(mesh, tree),
  )


def place[Tree](mesh: Mesh, tree: Tree) -> Tree:
  """Lays a tree out by `shardings`; what lies right is not copied.

  On one device the result may share memory with the input, so donate only one
  of them.
  """
  return _put(tree, shardings(mesh, tree))


def build(mesh: Mesh, function: Callable[..., Any], *arrays: Any) -> Any:
  """`function(*arrays)`, laid out by `shardings` and never in one place."""
  made = jax.eval_shape(function, *arrays)
  return jax.jit(function, out_shardings=shardings(mesh, made))(*arrays)


def shard_batch[Tree](mesh: Mesh, batch: Tree) -> Tree:
  """Places a batch with the leading axis of each array split by rows.

  Args:
    mesh: the devices.
    batch: pytree of arrays (B, ...); None and empty trees pass through.

  Returns:
    The same tree as device arrays; arrays that lie right are not copied.

  Raises:
    InputError: a leading axis is absent or cannot be cut into equal parts.
  """
  parts = row_parts(mesh)
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    shape = np.shape(leaf)
    if not shape or shape[0] % parts:
      name = jax.tree_util.keystr(path) or "batch"
      raise InputError(
        f"batch array {name} of shape {shape} cannot be cut into {parts} parts"
        f" of rows: make the batch size a multiple of {parts}"
      )
  return _put(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))


def replicate[Tree](mesh: Mesh, tree: Tree) -> Tree:
  """Places a whole copy of every array of `tree` on every device of `mesh`.

  Arrays that lie so already are returned as they are. On one device the result
  may share memory with the input, so donate only one of them.
  """
  return _put(tree, jax.tree.map(lambda _: replicated_sharding(mesh), tree))


def traced(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, which models and ops compute in on the devices of `mesh`."""
  if mesh.size == 1:
    return function

  def call(*args, **options):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **options)

  return call


@contextlib.contextmanager
def using(mesh: Mesh) -> Iterator[None]:
  """All that is compiled in the block is `traced`."""
  with contextlib.ExitStack() as stack:
    if mesh.size > 1:
      stack.enter_context(jax.set_mesh(mesh))
    yield


def collectives(text: str) -> dict[str, int]:
  """How often each kind of collective stands in a compiled program's text."""
  return {
    kind: len(re.findall(rf" {kind}(?:-start)?\(", text))
    for kind in _COLLECTIVES
  }


def to_host(tree: Any) -> Any:
  """Whole NumPy arrays of a tree, wherever its arrays lie.

  Where several processes hold parts of them, all must call it. One array at a
  time is whole on the devices.
  """
  return jax.tree.map(lambda x: jax.device_get(_whole(x)), tree)


def to_writer(tree: Any) -> Any:
  """`to_host` in the process that writes; None elsewhere.

  So the hosts of the others need no room for the whole tree.
  """
  if processes.is_writer():
    return to_host(tree)
  for leaf in jax.tree.leaves(tree):
    jax.block_until_ready(_whole(leaf))
  return None


def is_spread(tree: Any) -> bool:
  """Whether other processes hold parts of a tree's arrays."""
  return any(
    isinstance(x, jax.Array) and not x.is_fully_addressable
    for x in jax.tree.leaves(tree)
  )


def put_like(tree: Any, like: Any) -> Any:
  """Arrays that every process has, laid out as those of `like`."""
  return jax.tree.map(lambda x, own: _put_global(x, own.sharding), tree, like)


def _whole(x: Any) -> Any:
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return x
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = np.asarray(_whole(jax.random.key_data(x)))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  if x.is_fully_replicated:
    return x
  everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
  return jax.jit(lambda x: x, out_shardings=everywhere)(x)


def _put(tree: Any, where: Any) -> Any:
  leaves = jax.tree.leaves(where)
  if all(s.is_fully_addressable for s in leaves):
    return jax.device_put(tree, where)
  return jax.tree.map(_put_global, tree, where)


def _put_global(x: Any, where: NamedSharding) -> jax.Array:
  """Places what every process has, its own part in each."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    if x.sharding.is_equivalent_to(where, x.ndim):
      return x
    return jax.jit(lambda x: x, out_shardings=where)(x)
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _put_global(np.asarray(jax.random.key_data(x)), where)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, where, lambda part: x[part])
