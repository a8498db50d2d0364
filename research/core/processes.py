"""Several processes that make one run: who writes, and what all agree on.

Every process computes the same program over the devices of all. The first alone
reads and writes the folder of a run, and tells the others what they need of it;
so the folder may lie on a disk that it alone sees.
"""

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from models.errors import InputError, reason

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


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
    InputError: it raised one; in every process.
  """
  if count() == 1:
    return function()
  from jax.experimental import multihost_utils

  data = np.zeros(0, np.uint8)
  if is_writer():
    try:
      found = True, function()
    except InputError as error:
      found = False, str(error)
    data = np.frombuffer(pickle.dumps(found), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int64(data.size)))
  if not is_writer():
    data = np.zeros(size, np.uint8)
  data = np.asarray(multihost_utils.broadcast_one_to_all(data))
  worked, value = pickle.loads(data.tobytes())
  if not worked:
    raise InputError(value)
  return value


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
  """Whether `flag` is true in any process."""
  if count() == 1:
    return flag
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
