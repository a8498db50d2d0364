"""The Mosaic GPU `butterfly_matmul` of 1,024 channels: matrices in registers.

It computes what `mosaic_gpu_product` does. There both warpgroups have tiles of
their own, all 16 matrices of 64 channels lie in shared memory and are read for
every 16 rows, and 128 sums a thread leave no registers: what is spilled does
not fit the first cache beside so much shared memory.

Here both warpgroups share a tile: each multiplies eight of its blocks, whose
matrices stay in its registers, and so it has 64 sums a thread. Stages that mix
these blocks run in registers; the one of stride 512 meets blocks of the other
warpgroup, by way of shared memory. That holds nothing but the twiddles of large
strides and a ring of tiles, which results are written over in place, so that
many are on their way from memory and to it at any time.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import hopper
from ops import hopper_warpgroups as warpgroups
from ops.butterfly_matmul.mosaic_gpu_product import WIDE
from ops.hopper_tiles import compiler_params, swizzled

# Channels, blocks of 64 of them, and how many of these a warpgroup has.
CHANNELS = 1024
_HEIGHTS = CHANNELS // WIDE
_WORKERS = 2
_OWN = _HEIGHTS // _WORKERS
# Blocks that are copied at a time, half of a warpgroup's: shared memory holds
# them side by side.
_PANEL = _OWN // 2
_PANELS = _HEIGHTS // _PANEL
_LAYOUT = plgpu.Layout.WGMMA
_ROW = _LAYOUT.reduce(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched.

  Attributes:
    rows: Of x, in a tile.
    stages: Tiles in the ring; one less where a tile in between is kept.
    blocks: Thread blocks.
  """

  rows: int = 16
  stages: int = 6
  blocks: int = hopper.PROCESSORS


def _panel(increasing, worker, k):
  """The panel of a warpgroup's k-th block.

  Where products come first, the first four blocks meet blocks of the other
  warpgroup here, and the last four are given to it: so both do the same.
  """
  if not increasing:
    return 2 * worker + k // _PANEL
  return 3 * worker if k < _PANEL else 1 + worker


def entries(increasing: bool) -> np.ndarray:
  """Numbers (2, 64) of the twiddles in the order of their use, by warpgroup."""

  def of(stage, mine, other):
    # Entries of a pair are those of (low, low), (low, high), (high, low),
    # (high, high) blocks, as (out, in).
    stride, low = abs(mine - other), min(mine, other)
    pair = low // (2 * stride) * stride + low % stride
    first = (stage * _HEIGHTS // 2 + pair) * 4
    turn = 3 if mine > other else 0
    return [first + (i ^ turn) for i in range(4)]

  found = []
  for worker in range(_WORKERS):
    own = []
    blocks = [
      _panel(increasing, worker, k) * _PANEL + k % _PANEL for k in range(_OWN)
    ]
    if not increasing:
      for block in blocks:
        own += of(0, block, block ^ _OWN)[:2]
    strides = [1, 2, 4] if increasing else [4, 2, 1]
    for stage, stride in enumerate(strides, 0 if increasing else 1):
      for a, b in _pairs(stride):
        own += of(stage, blocks[a], blocks[b])
    if increasing:
      for block in blocks[:_PANEL]:
        own += of(3, block, block ^ _OWN)
    found.append(own)
  return np.array(found)


def _pairs(stride):
  """Numbers of the blocks of a warpgroup that a stage mixes."""
  first = [p // stride * 2 * stride + p % stride for p in range(_OWN // 2)]
  return [(a, a + stride) for a in first]


class _Block:
  """A thread block at work, in one of its warpgroups."""

  def __init__(self, c: Config, sizes, grid, interpret, keep, refs, s):
    """Takes sizes, references and shared memory by name."""
    self.c, self.s, self.interpret, self.keep = c, s, interpret, keep
    self.x_ref, self.w_ref, self.mix_ref, *out = refs
    self.y_ref, self.middle_ref = out[0], out[1] if keep else None
    rows, self.stacked = sizes
    self.stages = c.stages - keep
    self.me = lax.axis_index("warpgroup")
    self.stack = lax.axis_index("stacks")
    self.first, self.step = lax.axis_index("blocks"), grid
    left = pl.cdiv(rows, c.rows) - self.first
    self.count = lax.div(left + grid - 1, jnp.int32(grid))

  def rows(self, j):
    """The rows of tile j."""
    return pl.ds((self.first + j * self.step) * self.c.rows, self.c.rows)

  def slot(self, j):
    """The slot of tile j."""
    return lax.rem(j, jnp.int32(self.stages))

  def load(self):
    """Fills the ring."""
    s = self.s
    plgpu.copy_gmem_to_smem(self.mix_ref.at[self.stack], s["mix"], s["ready"])

    @pl.loop(0, self.count)
    def _(j):
      slot = self.slot(j)

      @pl.when(j >= self.stages)
      def _():
        plgpu.barrier_wait(s["consumed"].at[slot])

      for panel in range(_PANELS):
        column = self.stack * self.stacked + panel * _PANEL * WIDE
        plgpu.copy_gmem_to_smem(
          self.x_ref.at[self.rows(j), pl.ds(column, _PANEL * WIDE)],
          s["x"].at[slot, panel],
          s["loaded"].at[slot],
        )

    # Every phase of a barrier must be seen before the kernel ends.
    @pl.loop(jnp.maximum(self.count - self.stages, 0), self.count)
    def _(j):
      plgpu.barrier_wait(s["consumed"].at[self.slot(j)])

  def panel(self, k):
    """The panel of this warpgroup's k-th block."""
    return _panel(self.increasing, self.me, k)

  def matrix(self, k):
    """The matrix of the k-th block, to stay in registers."""
    block = self.panel(k) * _PANEL + k % _PANEL
    own = self.w_ref.at[self.stack * _HEIGHTS + block]
    if self.interpret:
      return own[...]
    return plgpu.load(own, layout=_LAYOUT, optimized=False)

  def at(self, tile, panel, k):
    """The rows of the k-th block that lie in this panel of a tile."""
    return tile.at[panel, :, pl.ds(k % _PANEL * WIDE, WIDE)]

  def get(self, part):
    """A block (64, rows), transposed, in float32."""
    if self.interpret:
      return part[...].T.astype(jnp.float32)
    return plgpu.load(part.T, layout=_LAYOUT).astype(jnp.float32)

  def put(self, part, value):
    """Writes a block (64, rows), transposed."""
    value = value.astype(jnp.bfloat16)
    if self.interpret:
      part[...] = value.T
    else:
      part.T[...] = value

  def put_all(self, tile, values):
    """Writes all blocks of this warpgroup."""
    for k, value in enumerate(values):
      self.put(self.at(tile, self.panel(k), k), value)

  def products(self, matrices, tile):
    """Matrices times blocks of rows, transposed."""
    parts = [self.at(tile, self.panel(k), k) for k in range(_OWN)]
    if self.interpret:
      return [
        jnp.dot(matrix, part[...].T, preferred_element_type=jnp.float32)
        for matrix, part in zip(matrices, parts)
      ]

    def scoped(*sums):
      for total, matrix, part in zip(sums, matrices, parts):
        plgpu.wgmma(total, matrix, part.T)
      plgpu.wgmma_wait(0)
      return [total[...] for total in sums]

    total = plgpu.ACC((WIDE, self.c.rows), jnp.float32)
    return pl.run_scoped(scoped, *[total] * _OWN)

  def twiddle(self, number):
    """An entry's 64 values, for each of the rows."""
    own, shape = self.s["mix"].at[self.me, number], (WIDE, self.c.rows)
    if self.interpret:
      return jnp.broadcast_to(own[...][:, None], shape)
    value = plgpu.load(own, layout=_ROW, optimized=False)
    return lax.broadcast_in_dim(value, shape, (0,))

  def pair(self, first, a, b):
    """Both results of a pair, by the twiddles from `first` on."""
    t = [self.twiddle(first + i) for i in range(4)]
    return t[0] * a + t[1] * b, t[2] * a + t[3] * b

  def mix(self, values, first, strides):
    """Runs stages within the warpgroup's blocks."""
    values = list(values)
    for stride in strides:
      for a, b in _pairs(stride):
        values[a], values[b] = self.pair(first, values[a], values[b])
        first += 4
    return values

  def send(self, j, tile, panels, ref):
    """Writes panels to memory."""
    for panel in panels:
      column = self.stack * CHANNELS + panel * (_PANEL * WIDE)
      place = self.rows(j), pl.ds(column, _PANEL * WIDE)
      plgpu.copy_smem_to_gmem(tile.at[panel], ref.at[place])

  def release(self, j):
    """Lets the slot of tile j be filled anew."""
    plgpu.barrier_arrive(self.s["consumed"].at[self.slot(j)])

  def freed(self, j, pending):
    """Releases the slot of the tile before, once it has been written out."""
    plgpu.wait_smem_to_gmem(pending, wait_read_only=True)

    @pl.when(j > 0)
    def _():
      self.release(j - 1)

  def meet(self):
    """Waits for the other warpgroup."""
    plgpu.barrier_arrive(self.s["met"])
    plgpu.barrier_wait(self.s["met"])

  def run(self):
    """Multiplies tile after tile."""
    matrices = [self.matrix(k) for k in range(_OWN)]
    plgpu.barrier_wait(self.s["ready"])

    def tile(j, _):
      slot = self.slot(j)
      plgpu.barrier_wait(self.s["loaded"].at[slot])
      self.tile(j, self.s["x"].at[slot], matrices)

    lax.fori_loop(0, self.count, tile, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    @pl.when(self.count > 0)
    def _():
      self.release(self.count - 1)


class _Increasing(_Block):
  """Products first."""

  increasing = True

  def tile(self, j, x, matrices):
    """Multiplies tile j in its slot."""
    meeting, given = self.panel(0), self.panel(_PANEL)
    # What is given to this warpgroup lies where the other one had it.
    taken = 3 - given
    values = self.products(matrices, x)
    if self.keep:
      # Two results of the tile before may be on their way yet.
      plgpu.wait_smem_to_gmem(2, wait_read_only=True)
      self.put_all(self.s["kept"], values)
    # All four warps have multiplied, and what is kept is seen by copies.
    plgpu.commit_smem()
    if self.keep:
      self.send(j, self.s["kept"], (meeting, given), self.middle_ref)
    values = self.mix(values, 0, (1, 2, 4))
    for k in range(_PANEL, _OWN):
      self.put(self.at(x, given, k), values[k])
    self.meet()
    parts = [self.at(x, taken, k) for k in range(_PANEL)]
    found = [self.get(part) for part in parts]
    for k, part in enumerate(parts):
      mine, theirs = self.pair(48 + 4 * k, values[k], found[k])
      self.put(self.at(x, meeting, k), mine)
      # A warp writes over what it has read itself.
      self.put(part, theirs)
    plgpu.commit_smem()
    self.send(j, x, (meeting, taken), self.y_ref)
    self.freed(j, 4 if self.keep else 2)


class _Decreasing(_Block):
  """Products last."""

  increasing = False

  def tile(self, j, x, matrices):
    """Multiplies tile j in its slot."""
    panels = self.panel(0), self.panel(_PANEL)
    values = []
    for k in range(_OWN):
      mine = self.get(self.at(x, self.panel(k), k))
      other = _panel(False, 1 - self.me, k)
      theirs = self.get(self.at(x, other, k))
      t = [self.twiddle(2 * k + i) for i in range(2)]
      values.append(t[0] * mine + t[1] * theirs)
    values = self.mix(values, 16, (4, 2, 1))
    # The other warpgroup has read what is written over.
    self.meet()
    self.put_all(x, values)
    plgpu.commit_smem()
    if self.keep:
      self.send(j, x, panels, self.middle_ref)
    values = self.products(matrices, x)
    if self.keep:
      # The two copies of this tile alone may be on their way yet.
      self.freed(j, 2)
    # All four warps have multiplied.
    plgpu.commit_smem()
    out = self.s["kept"] if self.keep else x
    self.put_all(out, values)
    plgpu.commit_smem()
    self.send(j, out, panels, self.y_ref)
    if not self.keep:
      self.freed(j, 2)


@functools.partial(
  jax.jit, static_argnames=("increasing", "keep", "config", "interpret")
)
def product(
  x, blocks, mixes, *, increasing, keep=False, config=None, interpret=False
):
  """Multiplies rows by a stack of butterflies of 1,024 channels.

  Args:
    x: (M, 1024) bfloat16, or (M, S 1024) with channels of their own for each
      stack; M a multiple of 8.
    blocks: (S, 16, 64, 64) bfloat16, the matrices of the small strides, as
      (out, in).
    mixes: (S, 4, 8, 2, 2, 64) float32, the twiddles of the large strides in the
      order of use.
    increasing: Whether blocks come first.
    keep: Whether to return what lies between both, too.
    config: A Config, or None.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (M, S 1024) bfloat16; and as much of what lies between, if kept.
  """
  c, rows, stacks = config or Config(), x.shape[0], blocks.shape[0]
  tiles = pl.cdiv(rows, c.rows)
  grid = max(min(c.blocks // stacks, tiles), 1)
  mixes = mixes.reshape(stacks, -1, WIDE)[:, entries(increasing)]
  high = tiles * c.rows if interpret else rows
  if interpret:
    x = jnp.pad(x, ((0, high - rows), (0, 0)))
  sizes = rows, CHANNELS if x.shape[1] > CHANNELS else 0
  tile = lambda *count: swizzled(
    (*count, _PANELS, c.rows, _PANEL * WIDE), jnp.bfloat16, 16
  )
  count = c.stages - keep
  scratch = {
    "mix": plgpu.SMEM(mixes.shape[1:], jnp.float32),
    "x": tile(count),
    "ready": plgpu.Barrier(),
    "loaded": plgpu.Barrier(num_arrivals=_PANELS, num_barriers=count),
    "consumed": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=count),
    "met": plgpu.Barrier(num_arrivals=_WORKERS),
  }
  if keep:
    scratch["kept"] = tile()

  def kernel(*refs, **s):
    kind = _Increasing if increasing else _Decreasing
    block = kind(c, sizes, grid, bool(interpret), keep, refs, s)

    warpgroups.divide(_WORKERS, block.me, block.run, block.load)

  out = jax.ShapeDtypeStruct((high, stacks * CHANNELS), x.dtype)
  run = plgpu.kernel(
    kernel,
    out_type=[out] * (1 + keep),
    grid=(grid, stacks),
    grid_names=("blocks", "stacks"),
    num_threads=_WORKERS + 1,
    thread_name="warpgroup",
    scratch_types=scratch,
    kernel_name="butterfly_matmul_" + ("fwd" if increasing else "bwd"),
    # Warps wait for each other where a comment above says so, and no more.
    compiler_params=dataclasses.replace(
      compiler_params(), unsafe_no_auto_barriers=True
    ),
    interpret=interpret,
  )
  found = [
    part[:rows] for part in run(x, blocks.reshape(-1, WIDE, WIDE), mixes)
  ]
  return tuple(found) if keep else found[0]
