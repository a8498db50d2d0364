"""Compiles for TPUs on a machine that has none.

The compiler is in the libtpu wheel, which `make tpu-check` fetches into
.venv/libtpu: beside the packages, since an importable libtpu makes every start
of jax look for a TPU and print that there is none. Files that use this module
end in _tpu_test.py; conftest.py leaves them out where the compiler is missing.
"""

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TARGETS = ("v5e", "v6e")

# What libtpu would ask the cloud for, where its log goes, and leave for two
# test processes to load it at once.
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_LOG_DIR": "disabled",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


def library() -> Path | None:
  """Returns libtpu.so, the TPU's compiler, or None where it is not there."""
  named = os.environ.get("TPU_LIBRARY_PATH")
  found = importlib.util.find_spec("libtpu")
  places = [
    Path(named) if named else None,
    Path(found.origin).parent / "libtpu.so" if found else None,
    Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so",
  ]
  return next((path for path in places if path and path.is_file()), None)


def compile_for(
  target: str, fn: Callable[..., Any], *args: Any
) -> jax.stages.Compiled:
  """Compiles `fn` as a TPU would, kernels included.

  Args:
    target: One of `TARGETS`.
    fn: A function of arrays, traced as it is: kernels not interpreted.
    *args: Its arguments as trees of `jax.ShapeDtypeStruct`.

  Returns:
    The compiled function; it cannot be called here, but `as_text()`,
    `memory_analysis()` and `cost_analysis()` answer.

  Raises:
    RuntimeError: libtpu is missing. Whatever lowering or the compiler raises.
  """
  sharding = SingleDeviceSharding(devices(f"{target}:2x2")[0])
  lowered = jax.jit(fn, in_shardings=sharding).lower(*args)
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, False)  # as for users
  try:
    return lowered.compile()
  finally:
    jax.config.update(name, before)


def kernels(compiled: jax.stages.Compiled) -> list[str]:
  """Returns the names of the Pallas kernels in a compiled function, sorted."""
  call = r'custom_call_target="tpu_custom_call"[^\n]*[ {]op_name="([^"]+)"'
  paths = re.findall(call, compiled.as_text())
  # A name may stand in the names of transformations: transpose(jvp(name)).
  names = (path.split("/")[-2] for path in paths)
  return sorted(re.search(r"[^()]*(?=\)*$)", name)[0] for name in names)


@functools.cache
def devices(topology: str) -> list[Any]:
  """Chips that are not there, of a topology such as "v5e:2x2".

  Raises:
    RuntimeError: libtpu is missing.
  """
  path = library()
  if path is None:
    raise RuntimeError("libtpu is missing: `make tpu-check` fetches it")
  jax.devices()  # before the plugin loads, so that no TPU is looked for
  # Restored at once, or scripts that tests start would load libtpu as well.
  names = _ENVIRONMENT | {"TPU_LIBRARY_PATH": str(path)}
  with mock.patch.dict(os.environ, names):
    return topologies.get_topology_desc(topology, "tpu").devices
