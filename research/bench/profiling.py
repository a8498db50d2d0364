"""Which kernels the time of a computation goes to, by JAX's profiler.

And how much of it goes to what devices send each other, and how much of that is
hidden behind what they compute meanwhile.
"""

import collections
import contextlib
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

# Kernels of NCCL, XLA's own for small sums, and copies between two GPUs.
_SENDS = re.compile(
  r"nccl\w*?_?(AllReduce|AllGather|ReduceScatter|AllToAll|SendRecv)"
  r"|(all_?reduce)_?kernel|(memcpyp2p)",
  re.IGNORECASE,
)

# A kernel's name, and its begin and end in nanoseconds.
Span = tuple[str, float, float]


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel's share of a call.

  Attributes:
    name: as the device has it, without a number at its end.
    ms: of all its launches in a call.
    launches: in a call.
  """

  name: str
  ms: float
  launches: float


def kernels(call: Callable[[], Any], calls: int = 2) -> list[Kernel]:
  """Runs `call` under the profiler; what takes longest stands first.

  XLA numbers kernels that it makes; those alike but for their number are one.

  Args:
    call: starts a computation that was compiled before.
    calls: how often it is run.

  Returns:
    Nothing where the device has no streams of kernels, as a CPU.
  """
  nanoseconds, launches = collections.Counter(), collections.Counter()
  with _traced(call, calls) as planes:
    for _, events in planes:
      for event in events:
        name = re.sub(r"(_\d+)+$", "", event.name)
        nanoseconds[name] += event.duration_ns
        launches[name] += 1
  return [
    Kernel(name, 1e-6 * spent / calls, launches[name] / calls)
    for name, spent in nanoseconds.most_common()
  ]


def communication(call: Callable[[], Any], calls: int = 2) -> dict[str, Any]:
  """Runs `call` under the profiler; what it sends, as `sent` says.

  Args:
    call: starts a computation on several devices that was compiled before.
    calls: how often it is run.

  Returns:
    Nothing where the devices have no streams of kernels, as CPUs.
  """
  with _traced(call, calls) as planes:
    devices = {}
    for name, events in planes:
      spans = devices.setdefault(name, [])
      for event in events:
        begin = event.start_ns
        spans.append((event.name, begin, begin + event.duration_ns))
  return sent([*devices.values()], calls) if any(devices.values()) else {}


def sent(devices: Sequence[Sequence[Span]], calls: int) -> dict[str, Any]:
  """Time of collectives in a trace, and the part that nothing hides.

  A collective's time includes that which it waits for other devices.

  Args:
    devices: kernels of each device.
    calls: that the trace holds.

  Returns:
    Milliseconds of a call, means over devices: "collective_ms" (when at least
    one collective runs), "exposed_ms" (the part when nothing else runs),
    "busy_ms" (when anything runs), and "collective_kinds", a sum by kind.
  """
  total, kinds = collections.Counter(), collections.Counter()
  for spans in devices:
    apart: Mapping[bool, list] = {True: [], False: []}
    for name, begin, end in spans:
      found = _SENDS.search(name)
      apart[found is not None].append((begin, end))
      if found:
        kinds[next(filter(None, found.groups()))] += end - begin
    total["collective_ms"] += _length(apart[True])
    total["busy_ms"] += _length(apart[True] + apart[False])
    total["exposed_ms"] += _length(apart[True] + apart[False])
    total["exposed_ms"] -= _length(apart[False])
  scale = 1e-6 / (calls * len(devices))
  found = {name: scale * spent for name, spent in total.items()}
  kinds = {name: scale * spent for name, spent in kinds.most_common()}
  return found | {"collective_kinds": kinds}


def _length(spans: Sequence[tuple[float, float]]) -> float:
  """How long at least one of the spans lasts."""
  whole, last = 0.0, -float("inf")
  for begin, end in sorted(spans):
    whole += max(end - max(begin, last), 0.0)
    last = max(last, end)
  return whole


@contextlib.contextmanager
def _traced(call: Callable[[], Any], calls: int) -> Iterator[list]:
  """Pairs of a GPU's name and its kernels, a stream each."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready([call() for _ in range(calls)])
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
  yield [
    (plane.name, line.events)
    for plane in data.planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if "Stream" in line.name
  ]
