import numpy as np
import pytest


class _Host:
  """The module of JAX that calls back, but for what it does to arguments."""

  def __init__(self, wrapped):
    self._wrapped = wrapped

  def __getattr__(self, name):
    return getattr(self._wrapped, name)

  def device_put(self, args, *more, **options):
    if not all(isinstance(arg, np.ndarray) for arg in args):
      return self._wrapped.device_put(args, *more, **options)
    # The interpreter keeps some of them, and whoever called takes them back.
    return [
      int(arg) if arg.dtype == np.int32 and not arg.ndim else np.array(arg)
      for arg in args
    ]


@pytest.fixture(scope="session", autouse=True)
def interpreter_on_the_host():
  """Gives the interpreter of kernels NumPy's arrays, not a device's.

  It reads all it is given as numbers of Python, thousands of times a kernel,
  and two thirds of a run was making arrays of JAX to read them from.
  """
  try:
    from jax._src import callback
    from jax._src.pallas.mosaic.interpret.shared_memory import (
      GenericSharedMemory,
    )

    swap, host = GenericSharedMemory.swap_buffer_content, _Host(callback.api)
  except (ImportError, AttributeError):
    yield  # Another version of JAX has them elsewhere.
    return

  def swap_content(self, key, place, value, *more, **options):
    # A number that a kernel stores was int32, and became Python's.
    if value.dtype == np.int64 and not value.ndim:
      value = value.astype(np.int32)
    return swap(self, key, place, value, *more, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(callback, "api", host)
    patch.setattr(GenericSharedMemory, "swap_buffer_content", swap_content)
    yield
