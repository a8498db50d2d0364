"""What Mosaic GPU kernels share whose tiles are 64 rows of a warpgroup.

Hopper's matrix unit (wgmma) multiplies tiles of 64 rows; one warpgroup of 128
threads is one Pallas thread.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

TILE = plgpu.Layout.WGMMA
# Layouts of a vector with one element a row, or a column, of a tile.
ROW = TILE.reduce(1)
COLUMN = TILE.reduce(0)

# Registers a thread of (computing, loading) warpgroups, by the number of those
# that compute. None leaves what the launch gives. A launch gives every thread
# alike, by eights, so the 512 for each of 128 threads are 168 for three
# warpgroups and 96 for five. What is asked for beyond their sum never comes,
# and the kernel waits forever.
REGISTERS = {1: None, 2: (232, 40), 3: (160, 32), 4: (112, 32)}


def tile(*shape: int) -> plgpu.SMEM:
  """Shared memory for bfloat16 tiles, swizzled as wgmma and TMA want them."""
  transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def vector(*shape: int) -> plgpu.SMEM:
  """Shared memory for float32 vectors."""
  return plgpu.SMEM(shape, jnp.float32)


def struct(shape, dtype) -> jax.ShapeDtypeStruct:
  """The type of a result."""
  return jax.ShapeDtypeStruct(tuple(shape), dtype)


def rows(vector_I: jax.Array, columns: int) -> jax.Array:
  """A tile (I, columns) with vector_I, (I,), down each column."""
  return lax.broadcast_in_dim(vector_I, (vector_I.shape[0], columns), [0])


def columns(vector_J: jax.Array, rows: int) -> jax.Array:
  """A tile (rows, J) with vector_J, (J,), along each row."""
  return lax.broadcast_in_dim(vector_J, (rows, vector_J.shape[0]), [1])


def products(start, body, interpret):
  """Runs `body(add, read)` with accumulators in registers.

  Args:
    start: For each accumulator its first value, float32, or its shape for 0.
    body: `add(k, a, b)` starts accumulator k += a @ b, for a tile a in shared
      memory or registers and a tile b in shared memory. `read(k, pending)` is
      its value as soon as at most `pending` of the products added are running.
    interpret: Whether the kernel is interpreted. The interpreter knows neither
      first values nor operands in registers, so there products are plain ones.

  Returns:
    What body returns.
  """
  if interpret:
    values = [
      jnp.zeros(value, jnp.float32) if isinstance(value, tuple) else value
      for value in start
    ]

    def add(k, a, b):
      product = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
      values[k] = values[k] + product

    return body(add, lambda k, pending: values[k])

  def scoped(*accumulators):
    for accumulator, value in zip(accumulators, start):
      if not isinstance(value, tuple):
        accumulator[...] = value
    return body(
      lambda k, a, b: plgpu.wgmma(accumulators[k], a, b),
      lambda k, pending: plgpu.wgmma_accumulator_load(
        accumulators[k], wait_n=pending
      ),
    )

  shapes = (v if isinstance(v, tuple) else v.shape for v in start)
  return pl.run_scoped(
    scoped, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)
  )


def set_registers(workers: int, *, computes: bool):
  """Moves registers from the warpgroup that loads to those that compute."""
  if REGISTERS[workers]:
    count = REGISTERS[workers][not computes]
    plgpu.set_max_registers(
      count, action="increase" if computes else "decrease"
    )


def divide(workers: int, worker, compute, load):
  """Runs `compute` in the first `workers` warpgroups, `load` in the next.

  Args:
    workers: how many compute.
    worker: number of this warpgroup, an int32 of shape ().
    compute: takes nothing.
    load: likewise.
  """

  @pl.when(worker < workers)
  def _():
    set_registers(workers, computes=True)
    compute()

  @pl.when(worker == workers)
  def _():
    set_registers(workers, computes=False)
    load()


def produce(fetch, steps, stages: int, *consumed):
  """The loading warpgroup: `fetch(i, slot)` for each step, `stages` ahead."""

  @pl.loop(0, steps)
  def _(i):
    slot = lax.rem(i, jnp.int32(stages))

    @pl.when(i >= stages)
    def _():
      for barrier in consumed:
        plgpu.barrier_wait(barrier.at[slot])

    fetch(i, slot)

  # Every phase of a barrier must be seen before the kernel ends.
  @pl.loop(jnp.maximum(steps - stages, 0), steps)
  def _(i):
    for barrier in consumed:
      plgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(stages))])
