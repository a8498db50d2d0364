"""How long computations take: the one timer of all benchmarks."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from research.bench.case import Call
from research.cost.sizes import nbytes

# Seconds that measured calls last together, and the most calls for it.
_IN_FLIGHT, _MOST_IN_FLIGHT = 5e-3, 50
# Measurements that a call gets however long it takes.
_LEAST = 3
# Four times the 60 MB that an accelerator may hold in its cache, and the most
# sets of arrays for it.
_COLD_BYTES, _MOST_SETS = 4 * 60_000_000, 8


@dataclasses.dataclass(frozen=True)
class Timed:
  """Times of a call.

  Attributes:
    seconds: median, of one of the call's passes.
    first_seconds: of the first call, which compiles.
  """

  seconds: float
  first_seconds: float


def medians(
  calls: Sequence[Call], *, repeats: int, seconds: float
) -> list[Timed | Exception]:
  """Times calls in turn, so that what changes meanwhile meets all of them.

  Launching a short computation may take longer than the computation, so as many
  calls as last a few milliseconds are in flight at once, unless they take fresh
  arguments.

  Args:
    calls: each is made once beforehand, to compile, and once to warm up.
    repeats: measurements of a call at most.
    seconds: after so many a call, no turn beyond the third begins.

  Returns:
    The times of each call, or what it raised.
  """
  runs = [_Run(call) for call in calls]
  for run in runs:
    run.guarded(run.warm_up)
  began = time.perf_counter()
  for turn in range(repeats):
    spent = time.perf_counter() - began
    if turn >= _LEAST and spent > seconds * len(runs):
      break
    for run in runs:
      run.guarded(run.measure)
  return [run.error or run.timed() for run in runs]


class _Run:
  """The measurements of one call."""

  def __init__(self, call: Call):
    self._call, self._flying, self._times = call, 1, []
    self.error: Exception | None = None

  def guarded(self, do: Callable[[], None]) -> None:
    """Keeps the error of a call, which is not made again."""
    if self.error is None:
      try:
        do()
      except Exception as error:  # Such as out of memory.
        # The arrays of its frames would stay alive with the traceback.
        self.error = error.with_traceback(None)

  def warm_up(self) -> None:
    self._first = self._seconds()
    if self._call.inputs is None:
      calls = round(_IN_FLIGHT / self._seconds())
      self._flying = min(max(calls, 1), _MOST_IN_FLIGHT)

  def measure(self) -> None:
    self._times.append(self._seconds())

  def timed(self) -> Timed:
    median = statistics.median(self._times)
    return Timed(median / self._call.count, self._first)

  def _seconds(self) -> float:
    """Of one call, from arguments at hand to results at hand."""
    call = self._call
    arguments = ()
    if call.inputs is not None:
      arguments = jax.block_until_ready(call.inputs())
    start = time.perf_counter()
    for _ in range(self._flying - 1):
      call.start(*arguments)
    call.wait(call.start(*arguments))
    return (time.perf_counter() - start) / self._flying


def cold_sets[T](arrays: T, platform: str) -> list[T]:
  """Returns `arrays` and copies of them, for calls to take in turn.

  Arrays that fit into the cache would be read from there when one call follows
  another, and not from main memory. So the sets hold 240 MB together, or are 8.
  On a CPU it is one set, and small shapes are timed from the cache.

  Args:
    arrays: any tree of arrays.
    platform: of the device, such as "gpu".
  """
  count = min(max(math.ceil(_COLD_BYTES / nbytes(arrays)), 1), _MOST_SETS)
  copies = 0 if platform == "cpu" else count - 1
  return [arrays] + [jax.tree.map(jnp.copy, arrays) for _ in range(copies)]


def in_turn[T](calls: Sequence[Callable[[], T]]) -> Callable[[], T]:
  """Returns a call that makes the first of `calls`, then the second, and on."""
  turns = itertools.cycle(calls)
  return lambda: next(turns)()


def seconds_of(call: Call, *, repeats: int, seconds: float) -> float:
  """Median seconds of a call alone; see `medians`.

  Raises:
    Exception: what the call raised.
  """
  (found,) = medians([call], repeats=repeats, seconds=seconds)
  if isinstance(found, Exception):
    raise found
  return found.seconds
