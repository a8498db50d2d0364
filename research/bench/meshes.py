"""Times on meshes: tokens a second, memory, and what devices send."""

import time
from typing import Any

import jax

from research.bench import mesh_work, profiling
from research.bench.mesh_cases import Case
from research.core import mesh as mesh_lib
from research.core import mesh_shape

# Measurements of a case, of which the fastest counts.
_TIMES = 3
# A call that takes so many times as long as a measurement is measured once.
_SLOW = 5


class Timing:
  """A case, to be compiled in any thread and then run.

  Args:
    case: what is timed.
    dtype: of activations; parameters and AdamW's moments are float32.
    attention: implementation, or None.

  Raises:
    InputError: the mesh does not do.
  """

  def __init__(self, case: Case, *, dtype: str, attention: str | None):
    self._case, self._dtype = case, dtype
    self._mesh = mesh_lib.make(case.shape)
    self._work = mesh_work.of(case, self._mesh, dtype, attention)
    work = self._work
    self._lowered = work.function.lower(*work.shapes)
    self._drawing = work.draw.lower(jax.random.key(0))
    self._run = self._draw = None
    self._compiling = 0.0

  def compile(self) -> None:
    """Compiles it, beside other threads."""
    began = time.perf_counter()
    self._run = self._lowered.compile()
    self._draw = self._drawing.compile()
    self._compiling = time.perf_counter() - began

  def row(self, seconds: float) -> dict[str, Any]:
    """A row of results: a call's least mean time of some measurements.

    Args:
      seconds: of each measurement, in whole calls and at least one.
    """
    work, run = self._work, self._run
    arguments = work.arguments(self._draw(jax.random.key(0)))

    def call():
      nonlocal arguments
      found = run(*arguments)
      if work.keeps:
        arguments = (found[0], *arguments[1:])
        return found[1]
      return found

    timed = lambda count: _timed(call, count)
    timed(1)
    spent = timed(1)
    count = max(round(seconds / spent), 1)
    if spent < _SLOW * seconds:
      spent = min(timed(count) for _ in range(_TIMES))
    found = {
      "system": "scale",
      "group": self._case.group,
      "kind": self._case.kind,
      "model": self._case.name,
      "case": self._case.text,
      "batch": self._case.batch,
      "length": self._case.length,
      "mesh": mesh_shape.words(self._case.shape),
      "devices": self._mesh.size,
      "visible_devices": jax.device_count(),
      "dtype": self._dtype,
      "ms": 1e3 * spent,
      "calls": count,
      "tokens_per_second": work.tokens / spent,
    }
    if work.flops:
      rate = work.flops * work.tokens / spent / self._mesh.size
      found["tflops_per_device"] = rate / 1e12
    if self._case.kind == "lm":
      found["loss"] = float(call()["loss"])
    if self._mesh.size > 1:
      found |= profiling.communication(call)
    return found | self._compiled()

  def _compiled(self) -> dict[str, Any]:
    """What the compiled program says of itself."""
    memory = self._run.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
      "gib_per_device": held / 2**30,
      "compile_seconds": self._compiling,
      "collectives": mesh_lib.collectives(self._run.as_text()),
    }


def _timed(call, count: int) -> float:
  """Mean seconds of so many calls, one behind the other."""
  began = time.perf_counter()
  for _ in range(count):
    found = call()
  jax.block_until_ready(found)
  return (time.perf_counter() - began) / count
