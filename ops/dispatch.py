"""The one resolver for `implementation=`, and what this machine is.

An op's module keeps `IMPLEMENTATIONS`, a mapping from a name to a `supports`
function, best first. `supports(*arrays, **options)` returns None where the
implementation runs, else the reason why not in one line; called with nothing
it answers for the machine alone.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from ops import sharding

type Supports = Callable[..., str | None]

# Compute capability of the oldest GPU that has wgmma.
HOPPER = (9, 0)


class UnsupportedError(NotImplementedError, ValueError):
  """The implementation asked for does not run here, or does not exist."""


def always(*arrays: Any, **options: Any) -> None:
  """The `supports` of an implementation that runs everywhere."""
  del arrays, options


def kernel(module: str, needs: Supports) -> Supports:
  """The `supports` of a kernel's module, imported only where `needs` is met."""

  def supports(*arrays: Any, **options: Any) -> str | None:
    return needs() or importlib.import_module(module).supports(
      *arrays, **options
    )

  return supports


def on_one_device(supports: Supports) -> Supports:
  """The `supports` of a kernel that does not run inside of `jax.shard_map`.

  A compiler cannot cut a kernel, so that under a mesh every device would
  compute the whole of it.
  """

  def alone(*arrays: Any, **options: Any) -> str | None:
    if axes := sharding.sizes():
      shape = ",".join(f"{name}:{size}" for name, size in axes.items())
      return f"runs on one device, and the mesh is {shape}"
    return supports(*arrays, **options)

  return alone


XLA_ONLY: Mapping[str, Supports] = types.MappingProxyType({"xla": always})


def device() -> jax.Device:
  """Returns the device that a computation runs on when none is named."""
  default = jax.config.jax_default_device
  if isinstance(default, str):
    return jax.devices(default)[0]
  return jax.devices()[0] if default is None else default


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu": the platform of `device()`."""
  return device().platform


def compute_capability() -> tuple[int, int] | None:
  """Returns an NVIDIA GPU's (major, minor), or None on any other device."""
  found = str(getattr(device(), "compute_capability", None))
  major, _, minor = found.partition(".")
  if platform() != "gpu" or not (major.isdigit() and minor.isdigit()):
    return None
  return int(major), int(minor)


def needs_hopper(*arrays: Any, **options: Any) -> str | None:
  """The machine part of `supports` for kernels of Hopper GPUs or newer."""
  del arrays, options
  found = compute_capability()
  if found is None:
    return f"needs an NVIDIA GPU, this is a {platform()}"
  if found < HOPPER:
    return f"needs compute capability 9.0, this GPU has {found[0]}.{found[1]}"
  return None


def needs_wgmma(*arrays: Any, **options: Any) -> str | None:
  """The machine part of `supports` for kernels with Hopper's matrix products.

  GPUs after Hopper have other instructions in their place.
  """
  reason = needs_hopper(*arrays, **options)
  if reason is not None:
    return reason
  found = compute_capability()
  if found[0] != HOPPER[0]:
    return f"needs Hopper's wgmma, this GPU has {found[0]}.{found[1]}"
  return None


def needs_tpu(*arrays: Any, **options: Any) -> str | None:
  """The machine part of `supports` for TPU kernels."""
  del arrays, options
  return None if platform() == "tpu" else f"needs a TPU, this is a {platform()}"


def resolve(
  op: str,
  implementations: Mapping[str, Supports],
  implementation: str | None = None,
  *arrays: Any,
  **options: Any,
) -> str:
  """Returns the name of the implementation to call.

  Args:
    op: Name of the op, for the error line.
    implementations: Names to `supports` functions, best first.
    implementation: None for the first that runs here, or exactly that one.
    *arrays: The op's arrays, passed to `supports`.
    **options: The op's options, passed to `supports`.

  Returns:
    A key of `implementations`.

  Raises:
    UnsupportedError: The name is unknown or does not run here (a
      NotImplementedError and a ValueError: one line, with the reason and the
      names that would run).
  """
  if implementation is None:
    for name, supports in implementations.items():
      if supports(*arrays, **options) is None:
        return name
    why = "no implementation runs here"
  elif implementation not in implementations:
    why = f"there is no implementation {implementation!r}"
  else:
    reason = implementations[implementation](*arrays, **options)
    if reason is None:
      return implementation
    why = f"{implementation!r} does not run here: {reason}"
  usable = [n for n, f in implementations.items() if not f(*arrays, **options)]
  raise UnsupportedError(f"{op}: {why}; usable: {', '.join(usable) or 'none'}")


def table() -> Iterator[tuple[str, str, str | None]]:
  """Yields (op, implementation, None or why not) for every public op."""
  import ops

  for name, value in sorted(vars(ops).items()):
    home = getattr(value, "__module__", None) or ""
    if name.startswith("_") or not isinstance(value, types.FunctionType):
      continue
    if home.startswith("ops.") and home != __name__:
      found = getattr(sys.modules[home], "IMPLEMENTATIONS", XLA_ONLY)
      for implementation, supports in found.items():
        yield name, implementation, supports()
