"""How long a computation takes."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Seconds that measured calls last together, and the most calls for it.
_IN_FLIGHT, _MOST_IN_FLIGHT = 5e-3, 50
# Four times the 60 MB that an accelerator may hold in its cache, and the most
# sets of arrays for it.
_COLD_BYTES, _MOST_SETS = 4 * 60_000_000, 8


def seconds_of(
  run: Callable[..., Any],
  inputs: Callable[[], tuple],
  *,
  repeats: int,
  seconds: float,
) -> float:
  """Median seconds of a call, from arguments at hand to results at hand.

  Args:
    run: called once beforehand, to compile.
    inputs: draws fresh arguments for every call.
    repeats: calls at most.
    seconds: after so many, no call beyond the third begins.
  """
  jax.block_until_ready(run(*inputs()))
  times, began = [], time.perf_counter()
  while len(times) < repeats:
    if len(times) >= 3 and time.perf_counter() - began > seconds:
      break
    arguments = jax.block_until_ready(inputs())
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def seconds_a_call(
  call: Callable[[], Any],
  wait: Callable[[Any], Any],
  *,
  repeats: int,
  seconds: float,
) -> float:
  """Median seconds of a call among calls that do not wait for each other.

  Launching a short computation may take longer than the computation, so as many
  calls as last a few milliseconds are in flight at once.

  Args:
    call: starts a computation; called beforehand, to compile and to warm up.
    wait: waits for what `call` returned, and all that was started before it.
    repeats: measurements at most.
    seconds: after so many, no measurement beyond the third begins.
  """

  def measure(calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
      call()
    wait(call())
    return (time.perf_counter() - start) / calls

  measure(1)
  calls = min(max(round(_IN_FLIGHT / measure(1)), 1), _MOST_IN_FLIGHT)
  times, began = [], time.perf_counter()
  while len(times) < repeats:
    if len(times) >= 3 and time.perf_counter() - began > seconds:
      break
    times.append(measure(calls))
  return statistics.median(times)


def cold_sets[T](arrays: T, platform: str) -> list[T]:
  """Returns `arrays` and copies of them, for calls to take in turn.

  Arrays that fit into the cache would be read from there when one call follows
  another, and not from main memory. So the sets hold 240 MB together, or are 8.
  On a CPU it is one set, and small shapes are timed from the cache.

  Args:
    arrays: any tree of arrays.
    platform: of the device, such as "gpu".
  """
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
  count = min(max(math.ceil(_COLD_BYTES / size), 1), _MOST_SETS)
  copies = 0 if platform == "cpu" else count - 1
  return [arrays] + [jax.tree.map(jnp.copy, arrays) for _ in range(copies)]


def in_turn[T](calls: Sequence[Callable[[], T]]) -> Callable[[], T]:
  """Returns a call that makes the first of `calls`, then the second, and on."""
  turns = itertools.cycle(calls)
  return lambda: next(turns)()
