"""Which kernels the time of a computation goes to, by JAX's profiler."""

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax


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
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready([call() for _ in range(calls)])
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
  nanoseconds, launches = collections.Counter(), collections.Counter()
  for plane in data.planes:
    if not plane.name.startswith("/device:GPU"):
      continue
    for line in plane.lines:
      if "Stream" in line.name:
        for event in line.events:
          name = re.sub(r"(_\d+)+$", "", event.name)
          nanoseconds[name] += event.duration_ns
          launches[name] += 1
  return [
    Kernel(name, 1e-6 * spent / calls, launches[name] / calls)
    for name, spent in nanoseconds.most_common()
  ]
