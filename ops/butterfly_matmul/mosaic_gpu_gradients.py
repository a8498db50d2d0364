"""The Mosaic GPU kernels for the gradients of a butterfly's matrices.

With n = 64 H channels each row adds an outer product to the H blocks of 64 x 64
channels, and one to each of the 64 mixes of H x H channels that lie 64 apart.
The blocks are products of transposed tiles, which the matrix unit sums. The
mixes are small, and their channels lie 64 apart in memory, where the matrix
unit cannot read them; so they are summed in registers, of which a thread has
one of the 64 places and a warpgroup some channels of the left side.

Each thread block sums over rows of its own, and XLA adds these sums: there are
no atomics, so the result does not depend on the order of thread blocks.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper
from ops import hopper_warpgroups as warpgroups
from ops.butterfly_matmul.mosaic_gpu_product import WIDE
from ops.hopper_tiles import compiler_params, store, swizzled

# Channels that a copy takes at most.
PANEL = 256
# Channels of a and of b that a thread block sums outer products of.
SIDE = 16
# Channels of a butterfly for which `of_wide_mixes` is faster.
WIDE_MIXES = 4096
# Two rows of 64 channels: two warps take each, and a thread one channel.
_LINES = plgpu.Layout.TILED(
  plgpu.Tiling(((2, WIDE), (32,), (1,))), (-4, -3), (-2,), -1
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How a kernel of gradients is launched.

  Attributes:
    rows: In a slot of the ring.
    stages: Slots of the ring.
    workers: Warpgroups that compute.
    blocks: Thread blocks.
  """

  rows: int
  stages: int
  workers: int
  blocks: int = hopper.PROCESSORS


def _walk(kernel_of, a, b, places, columns, groups, config, out_type, name,
          shared, interpret):  # fmt: skip
  """Runs a kernel over slots of rows, for some columns and rows of its own.

  Args:
    kernel_of: `kernel_of(me, wait, release, out_ref, group, part, count)`.
    a: (M, ...) bfloat16.
    b: Such another.
    places: Called with the number of a group, gives its first column in both.
    columns: Of a group, in both.
    groups: How many there are.
    config: A Config.
    out_type: Of the result, by part of the rows first.
    name: Of the kernel.
    shared: Makes shared memory for bfloat16.
    interpret: False, or the parameters of the interpreter.
  """
  c, rows = config, a.shape[0]
  steps, parts = pl.cdiv(rows, c.rows), out_type.shape[0]
  panel = min(columns, PANEL)
  panels = columns // panel
  if interpret:
    pad = ((0, steps * c.rows - rows), (0, 0))
    a, b = jnp.pad(a, pad), jnp.pad(b, pad)

  def kernel(a_ref, b_ref, out_ref, a_s, b_s, loaded, consumed):
    me = lax.axis_index("warpgroup")
    group, part = lax.axis_index("groups"), lax.axis_index("parts")
    count = lax.div(steps - part + parts - 1, jnp.int32(parts))
    slot_of = lambda i: lax.rem(i, jnp.int32(c.stages))

    def load():
      def fill(i, _):
        slot = slot_of(i)

        @pl.when(i >= c.stages)
        def _():
          plgpu.barrier_wait(consumed.at[slot])

        at = pl.ds((part + i * parts) * c.rows, c.rows)
        firsts = places(group)
        for ref, memory, first in zip((a_ref, b_ref), (a_s, b_s), firsts):
          for k in range(panels):
            some = pl.ds(first + k * panel, panel)
            plgpu.copy_gmem_to_smem(
              ref.at[at, some], memory.at[slot, k], loaded.at[slot]
            )

      lax.fori_loop(0, count, fill, None)

      # The slots that are still in use are waited for, because every phase of
      # a barrier must be seen before the kernel ends.
      @pl.loop(jnp.maximum(count - c.stages, 0), count)
      def _(i):
        plgpu.barrier_wait(consumed.at[slot_of(i)])

    def wait(i):
      slot = slot_of(i)
      plgpu.barrier_wait(loaded.at[slot])
      return a_s.at[slot], b_s.at[slot]

    def release(i):
      plgpu.barrier_arrive(consumed.at[slot_of(i)])

    warpgroups.divide(
      c.workers,
      me,
      lambda: kernel_of(me, wait, release, out_ref, group, part, count),
      load,
    )

  memory = shared((c.stages, panels, c.rows, panel))
  run = plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(groups, parts),
    grid_names=("groups", "parts"),
    num_threads=c.workers + 1,
    thread_name="warpgroup",
    scratch_types=dict(
      a_s=memory,
      b_s=memory,
      loaded=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=c.stages),
      consumed=plgpu.Barrier(num_arrivals=c.workers, num_barriers=c.stages),
    ),
    kernel_name=name,
    compiler_params=compiler_params(),
    interpret=interpret,
  )
  return run(a, b)


def _block(ref, h, rows=slice(None)):
  """Rows of the 64 channels of block h in a slot."""
  each = ref.shape[-1] // WIDE
  if isinstance(h, int):
    panel, within = divmod(h, each)
  else:
    panel, within = (f(h, jnp.int32(each)) for f in (lax.div, lax.rem))
  return ref.at[panel, rows, pl.ds(within * WIDE, WIDE)]


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def of_blocks(a, b, *, config, interpret=False):
  """The sums over rows of a's outer products with b, in blocks of 64 channels.

  Args:
    a: (M, 64 H) bfloat16, M a multiple of 8.
    b: Such another; or (M, 64 H / S), which each of S stacks reads.
    config: A Config; a warpgroup takes two blocks.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (H, 64, 64) float32.
  """
  c, (rows, width) = config, a.shape
  heights = width // WIDE
  own = 2
  columns = own * c.workers * WIDE
  groups = width // columns
  parts = min(max(c.blocks // groups, 1), pl.cdiv(rows, c.rows))

  def places(group):
    first = group * columns
    return first, lax.rem(first, jnp.int32(b.shape[1]))

  def kernel(me, wait, release, out_ref, group, part, count):
    def pieces(i):
      a, b = wait(i)
      for k in range(own):
        h = me * own + k
        yield tuple(_block(ref, h) for ref in (a, b))

    if interpret:

      def step(i, sums):
        new = [
          total + jnp.dot(a[...].T, b[...], preferred_element_type=jnp.float32)
          for total, (a, b) in zip(sums, pieces(i))
        ]
        release(i)
        return new

      found = lax.fori_loop(
        0, count, step, [jnp.zeros((WIDE, WIDE), jnp.float32)] * own
      )
    else:

      def scoped(*sums):
        @pl.loop(0, count)
        def _(i):
          for total, (a, b) in zip(sums, pieces(i)):
            plgpu.wgmma(total, a.T, b)
          # The products of the slot before are done when only those of this
          # one are left.
          plgpu.wgmma_wait(own)

          @pl.when(i > 0)
          def _():
            release(i - 1)

        plgpu.wgmma_wait(0)
        release(count - 1)
        return [total[...] for total in sums]

      found = pl.run_scoped(
        scoped, *[plgpu.ACC((WIDE, WIDE), jnp.float32)] * own
      )
    first = (group * c.workers + me) * own
    for k, total in enumerate(found):
      store(out_ref.at[part, first + k], total)

  found = _walk(
    kernel, a, b, places, columns, groups, c,
    jax.ShapeDtypeStruct((parts, heights, WIDE, WIDE), jnp.float32),
    "butterfly_matmul_bwd_blocks",
    lambda shape: swizzled(shape, jnp.bfloat16, 16), interpret,
  )  # fmt: skip
  return found.sum(axis=0)


@functools.partial(jax.jit, static_argnames=("stacks", "config", "interpret"))
def of_mixes(a, b, *, stacks=1, config, interpret=False):
  """The sums over rows of a's outer products with b, of channels 64 apart.

  Args:
    a: (M, S 64 H) bfloat16, M a multiple of 8.
    b: Such another; or (M, 64 H), which each of S stacks reads.
    stacks: S.
    config: A Config; its warpgroups share up to 16 channels of a, and each has
      as many of b.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (S, H, H, 64) float32, of a's and of b's channels.
  """
  c, rows = config, a.shape[0]
  heights = a.shape[1] // WIDE // stacks
  side = min(heights, SIDE)
  sides = heights // side
  groups = stacks * sides**2
  own = side // c.workers
  parts = min(max(c.blocks // groups, 1), pl.cdiv(rows, c.rows))
  shape = 2, WIDE

  def places(group):
    stack = lax.div(group, jnp.int32(sides**2))
    within = lax.rem(group, jnp.int32(sides**2))
    left, right = (f(within, jnp.int32(sides)) for f in (lax.div, lax.rem))
    first = stack * heights
    of_b = first if b.shape[1] == a.shape[1] else 0
    return (
      (first + left * side) * WIDE,
      (of_b + right * side) * WIDE,
    )

  def kernel(me, wait, release, out_ref, group, part, count):
    def read(ref, line, h):
      part = _block(ref, h, pl.ds(line, 2))
      if interpret:
        return part[...].astype(jnp.float32)
      value = plgpu.load(part, layout=_LINES, optimized=False)
      return value.astype(jnp.float32)

    def slot(i, sums):
      a, b = wait(i)

      def lines(k, sums):
        left = [read(a, 2 * k, me * own + h) for h in range(own)]
        right = [read(b, 2 * k, h) for h in range(side)]
        return [
          total + left[at // side] * right[at % side]
          for at, total in enumerate(sums)
        ]

      sums = lax.fori_loop(0, c.rows // 2, lines, sums)
      release(i)
      return sums

    zero = jnp.zeros(shape, jnp.float32)
    if not interpret:
      zero = plgpu.layout_cast(zero, _LINES)
    sums = lax.fori_loop(0, count, slot, [zero] * (own * side))
    for at, total in enumerate(sums):
      h = me * own + at // side
      store(out_ref.at[part, group, h, at % side], total)

  found = _walk(
    kernel, a, b, places, side * WIDE, groups, c,
    jax.ShapeDtypeStruct((parts, groups, side, side, *shape), jnp.float32),
    "butterfly_matmul_bwd_mixes",
    lambda shape: plgpu.SMEM(shape, jnp.bfloat16), interpret,
  )  # fmt: skip
  found = found.sum(axis=(0, 4)).reshape(stacks, sides, sides, side, side, WIDE)
  return found.transpose(0, 1, 3, 2, 4, 5).reshape(
    stacks, heights, heights, WIDE
  )


@functools.partial(jax.jit, static_argnames=("stacks",))
def of_wide_mixes(a, b, *, stacks=1):
  """What `of_mixes` returns, as products of XLA's of transposed arrays.

  The outer products grow by H^2, and what moves them to where the matrix unit
  reads them by H: from `WIDE_MIXES` channels on that is less.

  It was faster on an H200 at 32,768 x 4,096 (.47 ms, and .73), and slower at
  32,768 x 2,048 (.24, and .19).

  Args:
    a: As in `of_mixes`, and so are b and stacks.
  """
  # Several sums, because 64 products of two matrices are too few for the chip.
  parts, rows, count = 4, a.shape[0], a.shape[1] // WIDE // stacks
  of = lambda v: v.reshape(parts, rows // parts, -1, count, WIDE)
  a, b = of(a), jnp.broadcast_to(of(b), of(a).shape)
  found = jnp.einsum(
    "rmshp,rmsgp->rsphg", a, b, preferred_element_type=jnp.float32
  )
  return found.sum(axis=0).transpose(0, 2, 3, 1)


def blocks_config(n: int) -> Config:
  """How the gradient of blocks is launched for n channels."""
  return Config(rows=64, stages=3, workers=2 if n > 128 else 1)


def mixes_config(n: int) -> Config:
  """How the gradient of mixes is launched for n channels."""
  return Config(rows=16, stages=3, workers=4 if n > 128 else 2)
