"""What the device at hand can at most: by its data sheet, else measured."""

import functools

import jax
import jax.numpy as jnp

from research.bench.case import Call
from research.bench.timing import seconds_of
from research.cost import devices
from research.cost.roofline import Ceilings

# Columns of what is read.
_WIDE = 4096


def find(dtype: str) -> tuple[Ceilings, str]:
  """What jax's default device can, and where the numbers are from.

  Args:
    dtype: "bfloat16" or "float32", see `research.cost.devices.ceilings`.

  Returns:
    The ceilings, and "data sheet" or "measured".
  """
  device = jax.devices()[0]
  known = devices.ceilings(device.device_kind, dtype)
  if known is not None:
    return known, "data sheet"
  return measure(dtype), "measured"


def measure(dtype: str) -> Ceilings:
  """Times large products, copies and reads of random data.

  Memory gives more bytes to a kernel that reads alone than to one that writes
  as much. So the rate of bytes is the best of a copy, a sum, and the product of
  a row and a matrix: none of these can be above what the device can.

  Args:
    dtype: of the product; its precision is jax's default of the moment.
  """
  on_cpu = jax.default_backend() == "cpu"
  size, moved = (1024, 1 << 27) if on_cpu else (8192, 1 << 31)
  # A CPU draws the data of a repeat more slowly than it takes it.
  repeats, seconds = (5, 0.1) if on_cpu else (20, 0.5)
  keys = iter(jax.random.split(jax.random.key(0), 256))
  draw = jax.jit(
    lambda key: tuple(
      jax.random.normal(k, (size, size), dtype) for k in jax.random.split(key)
    )
  )
  rate = functools.partial(seconds_of, repeats=repeats, seconds=seconds)
  product = rate(
    Call(start=jax.jit(jnp.matmul), inputs=lambda: draw(next(keys)))
  )
  fill = jax.jit(lambda key: (jax.random.bits(key, (moved // 4,)),))
  # Flipping a bit, for a plain copy would be optimised away; in place, or
  # the time would be that of new pages.
  flip = jax.jit(lambda x: x ^ 1, donate_argnums=0)
  rates = [2 * moved / rate(Call(start=flip, inputs=lambda: fill(next(keys))))]
  # What is read needs not be fresh, for it is larger than any cache.
  kept = jax.random.bits(next(keys), (moved // (2 * _WIDE), _WIDE), jnp.uint16)
  row = jnp.ones((_WIDE,), jnp.bfloat16)
  for read in (_added_up, _multiplied):
    rates.append(moved / rate(Call(start=functools.partial(read, kept, row))))
  return Ceilings(flops=2 * size**3 / product, bytes=max(rates))


@jax.jit
def _added_up(kept, _):
  return jnp.sum(kept, axis=1, dtype=jnp.uint32)


@jax.jit
def _multiplied(kept, row):
  matrix = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
  return jnp.matmul(matrix, row[:, None], preferred_element_type=jnp.float32)
