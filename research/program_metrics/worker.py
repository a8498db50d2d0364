"""The process that compiles and times programs, alone on one core.

It is told chunks of indices through a pipe, and says through it what machine
it sees, which program it begins, and the rows of a chunk.
"""

import os
import platform
import sys
from multiprocessing.connection import Connection
from typing import Any

from research.program_metrics.measure import Timing

# First words of what a worker says.
HEADER, BEGIN, DONE = "header", "begin", "done"
_MACHINE = ("jax", "jaxlib", "backend", "device", "xla_flags")


def run(pipe: Connection, core: int | None, seed: int, timing: Timing) -> None:
  """Serves chunks until it is stopped.

  Args:
    pipe: to the process that collects.
    core: that the process is bound to; None binds it to none.
    seed: of the programs.
    timing: how latency is measured.
  """
  if core is not None:
    # The core is chosen before jax starts its backend, because the backend
    # takes as many threads as it sees cores.
    os.sched_setaffinity(0, {core})
  import jax  # only now, for the same reason

  # The time of a compile is measured, and not that of reading its result.
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    header = machine()
    pipe.send((HEADER, header))
    while True:
      rows = _chunk(pipe, seed, pipe.recv(), timing)
      pipe.send((DONE, [row | header for row in rows]))
      jax.clear_caches()
  except (EOFError, BrokenPipeError, KeyboardInterrupt):
    # The collecting process has ended, or it was interrupted and says so
    # itself.
    sys.exit(1)


def _chunk(
  pipe: Connection, seed: int, indices: list[int], timing: Timing
) -> list[dict[str, Any]]:
  """Rows of some programs; a failed one has "index" and "failure" alone.

  Every program is timed twice, the second time after all others of the chunk.
  """
  from research.program_metrics import grammar, measure

  found, rows = [], []
  for index in indices:
    pipe.send((BEGIN, index))
    try:
      made = measure.compile_program(grammar.program(seed, index))
      made.row["latency_us"] = measure.latency(made.call, timing)
      found.append(made)
    except Exception as error:  # Of any kind: the program is left out.
      words = f"{type(error).__name__}: {' '.join(str(error).split())}"
      rows.append({"index": index, "failure": words[:200]})
  for made in found:
    pipe.send((BEGIN, made.program.index))
    made.row["latency_again_us"] = measure.latency(made.call, timing)
    rows.append(made.row)
  return rows


def machine() -> dict[str, str]:
  """What the numbers depend on."""
  import jax
  import jaxlib

  found = (
    jax.__version__,
    jaxlib.__version__,
    jax.default_backend(),
    device_name(jax.devices()[0]),
    os.environ.get("XLA_FLAGS", ""),
  )
  return dict(zip(_MACHINE, found))


def machine_of(row: dict[str, Any]) -> dict[str, str]:
  """The part of a row that `machine` made."""
  return {name: row[name] for name in _MACHINE}


def device_name(device: Any) -> str:
  """The device's kind; of a CPU its model, where the system tells it."""
  if device.platform != "cpu":
    return device.device_kind
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      for line in file:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
          return value.strip()
  except OSError:
    pass
  return platform.machine()
