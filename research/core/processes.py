"""Several processes that make one run: who writes, and what all agree on.

Every process computes the same program over the devices of all. The first alone
reads and writes the folder of a run, and tells the others what they need of it;
so the folder may lie on a disk that it alone sees.
"""

import functools
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from models.errors import InputError, reason

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Bytes that go to all processes at a time, which each device holds once.
_PIECE = 1 << 28
_SIZE_UNIT = 1 << 30


def start() -> None:
  """Joins the processes of a run, before anything else of JAX is used.

  A cluster that JAX knows (Slurm, Kubernetes, TPU machines) says who is there.
  Elsewhere the variables JAX_COORDINATOR_ADDRESS (HOST:PORT of the first
  process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

  Raises:
    InputError: it is not said, or the others do not come.
  """
  address, count, number = (os.environ.get(name) for name in _NAMES)
  options = {}
  if address:
    if not all(text and text.isdecimal() for text in (count, number)):
      raise InputError(
        f"--multihost: {_NAMES[0]} is set, so {_NAMES[1]} and {_NAMES[2]} must"
        " be numbers, too"
      )
    options = {
      "coordinator_address": address,
      "num_processes": int(count),
      "process_id": int(number),
    }
  import jax

  try:
    jax.distributed.initialize(**options)
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f"--multihost: {reason(error)}: set {', '.join(_NAMES)}, or leave the "
      "flag out for one process"
    ) from error


def _are_many() -> bool:
  """Whether `start` was called; asked without devices, which JAX would start.

  Where nothing has imported JAX yet, nothing has called it.
  """
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def count() -> int:
  """Processes of the run."""
  return sys.modules["jax"].process_count() if _are_many() else 1


def is_writer() -> bool:
  """Whether this process is the one that writes."""
  return not _are_many() or sys.modules["jax"].process_index() == 0


def from_writer(function: Callable[[], Any]) -> Any:
  """What `function()` gives in the writer, in every process.

  Args:
    function: called in the writer alone; gives what can be pickled.

  Raises:
    InputError: it raised one; in every process. It raised something else: that
      is raised in the writer, and an InputError that tells of it elsewhere, so
      that no process waits for one that has ended.
  """
  if count() == 1:
    return function()
  raised, data = None, b""
  if is_writer():
    try:
      data = pickle.dumps((True, function()))
    except Exception as error:
      said = str(error)
      if not isinstance(error, InputError):
        said = f"the process that writes failed ({reason(error)})"
      raised, data = error, pickle.dumps((False, said))
  worked, value = pickle.loads(_broadcast(data))
  if raised is not None:
    raise raised
  if not worked:
    raise InputError(value)
  return value


def _broadcast(data: bytes) -> bytearray:
  """The writer's bytes in every process, a piece of them at a time."""
  from jax.experimental import multihost_utils

  size, writes, found = _broadcast_size(len(data)), is_writer(), bytearray()
  for begin in range(0, size, _PIECE):
    length = min(_PIECE, size - begin)
    piece = np.zeros(length, np.uint8)
    if writes:
      piece = np.frombuffer(data, np.uint8, length, begin)
    piece = multihost_utils.broadcast_one_to_all(piece)
    found += np.asarray(piece).data
  return found


def _broadcast_size(size: int) -> int:
  """The writer's number in every process.

  JAX makes int32 of it, which ends at 2 GiB, so it goes in two parts.
  """
  from jax.experimental import multihost_utils

  parts = np.array(divmod(size, _SIZE_UNIT), np.int32)
  high, low = multihost_utils.broadcast_one_to_all(parts)
  return int(high) * _SIZE_UNIT + int(low)


def writer_first(function: Callable[[], Any]) -> Any:
  """`function()` in every process, in the writer before all others.

  For what is kept in a folder that processes may share: who comes later finds
  it there.
  """
  if count() == 1:
    return function()
  made: list[Any] = []
  from_writer(lambda: made.append(function()))
  return made[0] if made else function()


def any_of(flag: bool) -> bool:
  """Whether `flag` is true in any process; waits for them."""
  return flag if count() == 1 else _highest(flag)()


class AnyOf:
  """`any_of` that waits for nothing, and so is told one call late.

  The answer to a call is read at the next one, as metrics of a step are. In one
  process it is told at once.
  """

  def __init__(self):
    self._asked = None

  def __call__(self, flag: bool) -> bool:
    """Whether the flag of the call before was true in any process."""
    if count() == 1:
      return flag
    before, self._asked = self._asked, _highest(flag)
    return before is not None and before()


def _highest(flag: bool) -> Callable[[], bool]:
  """Asks all processes; the result waits for their answers."""
  jax, (run, where) = sys.modules["jax"], _asking()
  with jax.set_mesh(where.mesh):
    own = np.full(jax.local_device_count(), flag, np.int32)
    found = run(jax.make_array_from_process_local_data(where, own))
  return lambda: bool(found.addressable_data(0))


@functools.cache
def _asking() -> tuple[Callable, Any]:
  """The program that asks all devices, and where its argument lies."""
  import jax
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(jax.devices()), ("devices",))
  everywhere = NamedSharding(mesh, PartitionSpec())
  run = jax.jit(lambda flags: flags.max(), out_shardings=everywhere)
  return run, NamedSharding(mesh, PartitionSpec("devices"))
