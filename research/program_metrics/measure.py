"""Compiles a program and says what it costs: exact counts, and its time."""

import dataclasses
import hashlib
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.program_metrics import grammar
from research.program_metrics.grammar import Program

# Counts that the compiler gives, and the attribute or key of each.
_ANALYSIS = {
  "flops": "flops",
  "bytes_accessed": "bytes accessed",
  "transcendentals": "transcendentals",
}
_MEMORY = {
  "argument_bytes": "argument_size_in_bytes",
  "output_bytes": "output_size_in_bytes",
  "temp_bytes": "temp_size_in_bytes",
  "peak_bytes": "peak_memory_in_bytes",
}
COUNTS = (*_ANALYSIS, *_MEMORY)
# Calls of one program that are not waited for one by one.
_MOST_CALLS = 64


@dataclasses.dataclass(frozen=True)
class Timing:
  """How latency is measured.

  Attributes:
    repeats: the least of so many measurements is taken.
    seconds: after so many of a run no measurement beyond the third begins.
    burst: seconds that a measurement lasts at least; short programs are
      called several times in it.
  """

  repeats: int = 30
  seconds: float = 0.05
  burst: float = 5e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
  """A program that can be called.

  Attributes:
    program: it.
    row: its texts and counts.
    call: runs it once on arrays that were made for it.
  """

  program: Program
  row: dict[str, Any]
  call: Callable[[], Any]


def compile_program(program: Program) -> Compiled:
  """Compiles a program on the default backend and reads its counts.

  Raises:
    Exception: whatever jax or the program raises.
  """
  namespace: dict[str, Any] = {}
  exec(compile(program.source, "<program>", "exec"), namespace)  # noqa: S102
  shapes = [
    jax.ShapeDtypeStruct(item.shape, item.dtype)
    for item in program.inputs.values()
  ]
  traced = jax.jit(namespace["f"]).trace(*shapes)
  lowered = traced.lower()
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  analysis = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  row = {
    "index": program.index,
    "operators": " ".join(program.operators),
    "source": program.source,
    "typed": program.typed,
    "jaxpr": without_addresses(str(traced.jaxpr)),
    "stablehlo": lowered.as_text(),
    "hash": fingerprint(compiled.as_text()),
    "compile_seconds": seconds,
  }
  # The key is missing where a program computes nothing of that kind.
  row |= {name: int(analysis.get(key, 0)) for name, key in _ANALYSIS.items()}
  row |= {name: int(getattr(memory, key)) for name, key in _MEMORY.items()}
  arrays = [
    jax.block_until_ready(jax.device_put(array.astype(jnp.dtype(item.dtype))))
    for array, item in zip(grammar.arguments(program), program.inputs.values())
  ]
  return Compiled(program, row, lambda: compiled(*arrays))


def latency(call: Callable[[], Any], timing: Timing) -> float:
  """Least microseconds of a call, results at hand.

  Calls of one measurement follow each other without a wait between them. The
  least is taken, where the timer of `research.bench` takes the median, since
  what else runs on a core only ever adds to a program's own time.
  """
  jax.block_until_ready(call())
  start = time.perf_counter()
  jax.block_until_ready(call())
  once = max(time.perf_counter() - start, 1e-7)
  calls = min(max(round(timing.burst / once), 1), _MOST_CALLS)
  best, began = once, time.perf_counter()
  for done in range(timing.repeats):
    if done >= 3 and time.perf_counter() - began > timing.seconds:
      break
    start = time.perf_counter()
    for _ in range(calls - 1):
      call()
    jax.block_until_ready(call())
    best = min(best, (time.perf_counter() - start) / calls)
  return best * 1e6


def without_addresses(text: str) -> str:
  """Takes out what a Python object's place in memory brings into a jaxpr."""
  return re.sub(r" at 0x[0-9a-f]+", "", text)


def fingerprint(hlo: str) -> str:
  """A digest of compiled HLO, in which names and places do not count.

  Dropped are the heading, tables of source files and metadata; names become
  numbers in the order in which they come.
  """
  names = map(str, itertools.count())
  number: dict[str, str] = {}

  def rename(match: re.Match) -> str:
    if match[0] not in number:
      number[match[0]] = next(names)
    return f"%{number[match[0]]}"

  digest = hashlib.sha256()
  # Instructions are indented; all other lines are headings and tables.
  heads = [line for line in hlo.splitlines() if line.startswith("HloModule")]
  layout = re.findall(r"entry_computation_layout=\{(.*?\)->.*?)\}[,\n]",
                      f"{heads[0] if heads else ''}\n")  # fmt: skip
  digest.update("".join(layout).encode())
  for line in hlo.splitlines():
    if line.startswith(("%", "ENTRY")):
      line = line.split(" (")[0]
    elif not line.startswith("  "):
      continue
    line = re.sub(r", metadata=\{[^{}]*\}", "", line)
    digest.update(re.sub(r"%[\w.\-]+", rename, line).encode())
  return digest.hexdigest()[:24]
