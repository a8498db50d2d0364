"""The Mosaic GPU `quantized_matmul` for Hopper: many rows, in few bits.

With many rows the matrix unit (wgmma) is the limit, and its rate doubles where
both operands have 8 bits. So levels are multiplied as int8 with int32 sums, or
as float8_e4m3fn; activations in bfloat16 are multiplied in that.

A thread block walks over tiles of the result. One of its warpgroups loads, a
ring of chunks of the summed axis ahead; two multiply, so that what one does
beside multiplying is hidden behind the other's products. Weights that come in
fewer bits than they are multiplied in are converted in registers. Registers
hold the operand with few rows for each instruction, so the product is then
transposed: columns of the weights are the rows of the matrix unit, 64 to a
warpgroup, and up to 256 rows of x share one conversion.

Scales multiply sums. One scale a column waits for the whole sum; those of
groups need a second sum, in float32, beside that of the group.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper
from ops.hopper_tiles import (
  SUMS,
  TILE,
  compiler_params,
  store,
  swizzled,
  swizzled_levels,
)
from ops.quantized import formats
from ops.quantized.quantize import unpack

WORKERS = 2
# Registers a thread of the warpgroups that multiply, and of that which loads.
_REGISTERS = (232, 40)
# Bytes of a row of a chunk: as wide as a swizzled tile can be.
LINE = 128
_LAYOUT = plgpu.Layout
# An int32 n below 2^22 in size, added to these bits, gives those of the float
# 1.5 * 2^23 + n.
_MAGIC_BITS, _MAGIC = 0x4B400000, 12582912.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched.

  Attributes:
    rows: Of x, in a thread block's tile of the result.
    columns: Of the weights, in such a tile.
    transposed: Whether columns are the rows of the matrix unit.
    split: Which of both axes the warpgroups that multiply share.
    stages: Chunks in the ring.
    cluster: Which axis two thread blocks lie along that load together what they
      share, or None.
    walk: Tiles along the columns of a strip that neighbours in time stay in, so
      that what they load is in the L2 cache.
    promote: Chunks after which sums are added to others in float32; 0 for the
      whole sum. With groups their size decides.
    blocks: Thread blocks.
  """

  rows: int = 128
  columns: int = 256
  transposed: bool = False
  split: str = "rows"
  stages: int = 4
  cluster: str | None = None
  walk: int = 8
  promote: int = 0
  blocks: int = hopper.PROCESSORS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes that follow from operands and a Config.

  Attributes:
    rows: M.
    width: F.
    depth: D.
    groups: Scales of a column.
    packed: Whether weights come as bytes of two levels.
    stored: The dtype that weights are kept in.
    operand: The dtype of the product.
    out: The dtype of the result.
    config: The Config.
    interpret: Whether the kernel is interpreted.
  """

  rows: int
  width: int
  depth: int
  groups: int
  packed: bool
  stored: jnp.dtype
  operand: jnp.dtype
  out: jnp.dtype
  config: Config
  interpret: bool

  @property
  def chunk(self) -> int:
    """Of D, in a slot of the ring."""
    return LINE // self.operand.itemsize

  @property
  def chunks(self) -> int:
    """Of D."""
    return self.depth // self.chunk

  @property
  def converted(self) -> bool:
    """Whether weights go through registers."""
    return self.packed or self.stored != self.operand

  @property
  def sums(self) -> jnp.dtype:
    """The dtype of the matrix unit's sums."""
    whole = self.operand == jnp.int8
    return jnp.dtype(jnp.int32 if whole else jnp.float32)

  @property
  def shifted(self) -> bool:
    """Whether sums begin with the bits of a float, so that they are floats."""
    largest = self.promote * self.chunk * 127 * (7 if self.packed else 127)
    return self.sums == jnp.int32 and 0 < largest < 2**22

  @property
  def promote(self) -> int:
    """Chunks after which sums are promoted, or 0."""
    if self.groups > 1:
      return self.depth // self.groups // self.chunk
    return self.config.promote

  @property
  def own(self) -> tuple[int, int]:
    """Rows of x and columns of a warpgroup's part of a tile."""
    rows, columns = self.config.rows, self.config.columns
    if self.config.split == "rows":
      return rows // WORKERS, columns
    return rows, columns // WORKERS

  @property
  def tiles(self) -> tuple[int, int]:
    """Of a cluster's thread blocks together, along both axes."""
    rows, columns = self.config.rows, self.config.columns
    rows *= 1 + (self.config.cluster == "rows")
    columns *= 1 + (self.config.cluster == "columns")
    return -(-self.rows // rows), -(-self.width // columns)

  @property
  def clusters(self) -> int:
    """That walk over the tiles."""
    size = 1 + (self.config.cluster is not None)
    return min(self.config.blocks // size, math.prod(self.tiles))

  @property
  def piece(self) -> tuple[int, int]:
    """Rows and columns of the result that are written at a time."""
    line = LINE // self.out.itemsize
    return (line, TILE) if self.config.transposed else (TILE, line)

  @property
  def swizzle(self) -> int:
    """Bytes of a line of the result in shared memory.

    TMA cuts off whole lines alone.
    """
    fit = [s for s in (LINE, 64) if not self.width % (s // self.out.itemsize)]
    return fit[0] if fit else 32

  @property
  def ring(self) -> int:
    """Bytes of the ring and of scales."""
    c = self.config
    w_bits = 4 if self.packed else 8 * self.stored.itemsize
    chunk = c.rows * LINE + c.columns * self.chunk * w_bits // 8
    scales = 4 * c.columns * (c.stages if self.groups > 1 else 2)
    return c.stages * chunk + scales + 8 * c.rows + 1024

  @property
  def pieces(self) -> int:
    """Of the result, that a warpgroup has memory for."""
    free = hopper.SHARED_MEMORY - self.ring
    return min(2, free // (WORKERS * TILE * LINE))

  @property
  def unfit(self) -> str | None:
    """What the matrix unit would refuse, or would never end."""
    c = self.config
    left, right = self.own[::-1] if c.transposed else self.own
    if left % TILE or right % 8 or right > 256:
      return f"a warpgroup cannot multiply {self.own} of {c}"
    if any(a % b for a, b in zip(self.own, self.piece)):
      return f"the result cannot be written in pieces of {c}"
    if self.converted and not (c.transposed and left == TILE):
      return f"weights in registers are {TILE} rows, not {c}"
    if self.pieces < 1:
      return f"{self.ring} bytes are too many for {c}"
    if c.stages < 2 or (self.promote and self.chunks % self.promote):
      return f"{self.chunks} chunks do not fit {c}"
    return None


def _scratch(k: Sizes):
  """Shared memory and barriers by name."""
  c = k.config
  bits = 8 * k.operand.itemsize
  w_bits = 4 if k.packed else 8 * k.stored.itemsize
  weights = (c.stages, c.columns, k.chunk)
  consumed = plgpu.Barrier
  if c.cluster:
    consumed = functools.partial(
      plgpu.ClusterBarrier, collective_axes=("cluster",)
    )
  scratch = {
    "x": swizzled((c.stages, c.rows, k.chunk), k.operand, bits),
    "w": swizzled_levels(weights, k.stored, w_bits, k.interpret),
    "out": swizzled(
      (WORKERS, k.pieces, *k.piece), k.out, 8 * k.out.itemsize, k.swizzle
    ),
    "of_rows": plgpu.SMEM((2, c.rows), jnp.float32),
    "loaded": plgpu.Barrier(
      num_arrivals=2 + (k.groups > 1), num_barriers=c.stages
    ),
    "consumed": consumed(num_arrivals=WORKERS, num_barriers=c.stages),
    "factors_loaded": plgpu.Barrier(
      num_arrivals=1 + (k.groups == 1), num_barriers=2
    ),
    "factors_consumed": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=2),
  }
  if k.groups == 1:
    scratch["of_columns"] = plgpu.SMEM((2, c.columns), jnp.float32)
  else:
    scratch["of_groups"] = plgpu.SMEM((c.stages, c.columns), jnp.float32)
  return scratch


class _Block:
  """A thread block at work, in one of its warpgroups."""

  def __init__(self, k: Sizes, refs, s):
    """Takes sizes, references by name and shared memory by name."""
    self.k, self.c, self.s = k, k.config, s
    self.x_ref, self.w_ref, self.rows_ref, self.columns_ref, self.y_ref = refs
    self.me = lax.axis_index("warpgroup")
    self.first = lax.axis_index("blocks")
    count = math.prod(k.tiles)
    # Tiles of this thread block.
    self.count = lax.div(
      count - self.first + k.clusters - 1, jnp.int32(k.clusters)
    )

  def origin(self, j):
    """First row and column of this block's tile j."""
    c = self.c
    at = plgpu.planar_snake(
      self.first + j * self.k.clusters, self.k.tiles, 1, c.walk
    )
    row, column = at
    if c.cluster == "rows":
      row = 2 * row + lax.axis_index("cluster")
    elif c.cluster == "columns":
      column = 2 * column + lax.axis_index("cluster")
    return row * c.rows, column * c.columns

  def slot(self, n):
    """Of chunk n, counted through all tiles."""
    return lax.rem(n, jnp.int32(self.c.stages))

  def load(self):
    """Fills the ring."""
    k, c, s = self.k, self.c, self.s
    bytes_s = s["w"][0] if k.packed and not k.interpret else s["w"]
    shared = {"collective_axes": "cluster"}
    of_x = shared if c.cluster == "columns" else {}
    of_w = shared if c.cluster == "rows" else {}

    def tile(j, _):
      row, column = self.origin(j)
      rows, columns = pl.ds(row, c.rows), pl.ds(column, c.columns)
      turn = lax.rem(j, jnp.int32(2))

      @pl.when(j >= 2)
      def _():
        plgpu.barrier_wait(s["factors_consumed"].at[turn])

      arrival = s["factors_loaded"].at[turn]
      plgpu.copy_gmem_to_smem(
        self.rows_ref.at[rows], s["of_rows"].at[turn], arrival
      )
      if k.groups == 1:
        plgpu.copy_gmem_to_smem(
          self.columns_ref.at[columns], s["of_columns"].at[turn], arrival
        )

      def chunk(i, _):
        n = j * k.chunks + i
        slot = self.slot(n)

        @pl.when(n >= c.stages)
        def _():
          plgpu.barrier_wait(s["consumed"].at[slot])

        arrival = s["loaded"].at[slot]
        depth = pl.ds(i * k.chunk, k.chunk)
        plgpu.copy_gmem_to_smem(
          self.x_ref.at[rows, depth], s["x"].at[slot], arrival, **of_x
        )
        width = bytes_s.shape[-1]
        plgpu.copy_gmem_to_smem(
          self.w_ref.at[columns, pl.ds(i * width, width)],
          bytes_s.at[slot],
          arrival,
          **of_w,
        )
        if k.groups > 1:
          group = lax.div(i, jnp.int32(k.promote))
          plgpu.copy_gmem_to_smem(
            self.columns_ref.at[group, columns], s["of_groups"].at[slot],
            arrival,
          )  # fmt: skip

      lax.fori_loop(0, k.chunks, chunk, None)

    lax.fori_loop(0, self.count, tile, None)
    # Every phase of a barrier must be seen before the kernel ends.
    total = self.count * k.chunks

    @pl.loop(jnp.maximum(total - c.stages, 0), total)
    def _(n):
      plgpu.barrier_wait(s["consumed"].at[self.slot(n)])

    @pl.loop(jnp.maximum(self.count - 2, 0), self.count)
    def _(j):
      plgpu.barrier_wait(s["factors_consumed"].at[lax.rem(j, jnp.int32(2))])

  def parts(self, axis: str):
    """This warpgroup's part of a tile along an axis."""
    size = self.k.own[axis == "columns"]
    return pl.ds(self.me * size if self.c.split == axis else 0, size)

  def operands(self, slot):
    """Of the matrix unit, (left, K) and a reference to (right, K)."""
    k, s = self.k, self.s
    x = s["x"].at[slot, self.parts("rows")]
    codes = s["w"][1] if k.packed and not k.interpret else s["w"]
    w = codes.at[slot, self.parts("columns")]
    if not k.config.transposed:
      return x, w
    return (self.levels(w) if k.converted else w), x

  def levels(self, ref):
    """Weights in registers, in the dtype of the product."""
    if self.k.operand == jnp.bfloat16:
      # A thread loads 32 bits at a time, and gets others' levels as wgmma
      # wants them.
      layout = _LAYOUT.WGMMA_UPCAST_2X
      if self.k.packed:
        layout = _LAYOUT.WGMMA_UPCAST_4X
      values = plgpu.load(ref, layout=layout, optimized=False)
      values = plgpu.layout_cast(values, _LAYOUT.WGMMA)
    else:
      values = plgpu.load(ref, layout=_LAYOUT.WGMMA_8BIT, optimized=False)
    return values.astype(self.k.operand)

  def multiply(self, n, steps, read=lambda slot: ()):
    """The sum over `steps` chunks from chunk n.

    Args:
      n: Counted through all tiles.
      steps: At least one.
      read: Called with the slot of the first chunk, before it is released.

    Returns:
      The sum and what `read` returned.
    """
    k, s = self.k, self.s
    left, right = k.own[::-1] if k.config.transposed else k.own

    def wait(i):
      slot = self.slot(n + i)
      plgpu.barrier_wait(s["loaded"].at[slot])
      return slot

    def release(i):
      plgpu.barrier_arrive(s["consumed"].at[self.slot(n + i)])

    if k.interpret:
      # The interpreter knows neither first sums nor operands in registers.
      def plain(i, total):
        return add(i, wait(i), total)

      def add(i, slot, total):
        a, b = self.operands(slot)
        total += jnp.dot(a[...], b[...].T, preferred_element_type=k.sums)
        release(i)
        return total

      first = wait(0)
      found = read(first)
      total = add(0, first, jnp.zeros((left, right), k.sums))
      return lax.fori_loop(1, steps, plain, total), found

    def scoped(sums):
      if k.shifted:
        sums[...] = plgpu.layout_cast(
          jnp.full((left, right), _MAGIC_BITS, jnp.int32), _LAYOUT.WGMMA
        )

      def add(slot):
        a, b = self.operands(slot)
        plgpu.wgmma(sums, a, b.T)

      # With one product running, that of the chunk before is done. But levels
      # in registers are read until their product ends: the next ones, which
      # take the same registers, wait for that.
      running = 0 if k.converted else 1
      first = wait(0)
      found = read(first)
      add(first)
      if not running:
        plgpu.wgmma_wait(0)
        release(0)

      @pl.loop(1, steps)
      def _(i):
        add(wait(i))
        plgpu.wgmma_wait(running)
        release(i - running)

      total = sums[...]
      if running:
        release(steps - 1)
      return total, found

    total, found = pl.run_scoped(scoped, plgpu.ACC((left, right), k.sums))
    if k.shifted:
      total = lax.bitcast_convert_type(total, jnp.float32) - _MAGIC
    return total, found

  def promoted(self, j):
    """The sum of a tile's groups in float32, each times its scale."""
    k, s = self.k, self.s
    left, right = k.own[::-1] if k.config.transposed else k.own
    axis = 0 if k.config.transposed else 1

    def scales(slot):
      own = s["of_groups"].at[slot, self.parts("columns")]
      return plgpu.load(
        own, layout=_LAYOUT.WGMMA.reduce(1 - axis), optimized=False
      )

    def group(g, total):
      n = j * k.chunks + g * k.promote
      if k.groups == 1:
        part, _ = self.multiply(n, k.promote)
        return total + part.astype(jnp.float32)
      part, own = self.multiply(n, k.promote, scales)
      return total + part.astype(jnp.float32) * _spread(own, part.shape, axis)

    zero = plgpu.layout_cast(
      jnp.zeros((left, right), jnp.float32), _LAYOUT.WGMMA
    )
    return lax.fori_loop(0, k.chunks // k.promote, group, zero)

  def finish(self, j, total):
    """Scales the sums of tile j and writes them, piece by piece."""
    k, s, turned = self.k, self.s, self.k.config.transposed
    row, column = self.origin(j)
    turn = lax.rem(j, jnp.int32(2))
    plgpu.barrier_wait(s["factors_loaded"].at[turn])
    rows, columns = self.parts("rows"), self.parts("columns")
    (height, width), place = k.piece, 0
    for r in range(0, k.own[0], height):
      for f in range(0, k.own[1], width):
        own = [slice(r, r + height), slice(f, f + width)]
        value = total[tuple(own[::-1] if turned else own)].astype(jnp.float32)
        found = [("of_rows", rows.start + r, height, int(turned))]
        if k.groups == 1:
          found.append(("of_columns", columns.start + f, width, 1 - turned))
        for name, first, size, axis in found:
          ref = s[name].at[turn, pl.ds(first, size)]
          layout = _LAYOUT.WGMMA.reduce(1 - axis)
          factor = plgpu.load(ref, layout=layout, optimized=False)
          value *= _spread(factor, value.shape, axis)
        out = s["out"].at[self.me, place % k.pieces]
        # What was in this memory has left it.
        plgpu.wait_smem_to_gmem(k.pieces - 1, wait_read_only=True)
        value = value.astype(k.out)
        if turned and k.out.itemsize == 4:
          # No instruction transposes numbers of 32 bits.
          store(out.T, plgpu.layout_cast(value, SUMS))
        else:
          (out.T if turned else out)[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          out,
          self.y_ref.at[
            pl.ds(row + rows.start + r, height),
            pl.ds(column + columns.start + f, width),
          ],
        )
        place += 1
    plgpu.barrier_arrive(s["factors_consumed"].at[turn])

  def work(self):
    """Multiplies tile after tile."""
    k = self.k

    def tile(j, _):
      if k.promote:
        total = self.promoted(j)
      else:
        total, _ = self.multiply(j * k.chunks, k.chunks)
      self.finish(j, total)

    lax.fori_loop(0, self.count, tile, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=False)


def _spread(vector, shape, axis: int) -> jax.Array:
  """A vector along an axis of a tile."""
  value = lax.broadcast_in_dim(vector, shape, (axis,))
  return plgpu.layout_cast(value, _LAYOUT.WGMMA)


# A function of its own, since it is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("out", "config", "interpret"))
def products(x, w, of_rows, scales, *, out, config, interpret=False):
  """Multiplies levels of activations by weights as QTensors keep them.

  Args:
    x: (M, D) int8, float8_e4m3fn or bfloat16.
    w: (F, D) of x's dtype or int8, or (F, D / 2) uint8 with two levels of 4
      bits a byte.
    of_rows: (M,) float32, the scales of x.
    scales: (F, G) float32.
    out: The dtype of the result.
    config: A Config.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (M, F).
  """
  (rows, depth), width = x.shape, w.shape[0]
  # TMA takes rows by eights.
  beyond = -rows % 8
  x, of_rows = jnp.pad(x, ((0, beyond), (0, 0))), jnp.pad(of_rows, (0, beyond))
  k = Sizes(
    rows=rows + beyond,
    width=width,
    depth=depth,
    groups=scales.shape[1],
    packed=w.dtype == jnp.uint8,
    stored=jnp.dtype(w.dtype),
    operand=jnp.dtype(x.dtype),
    out=jnp.dtype(out),
    config=config,
    interpret=bool(interpret),
  )
  if reason := k.unfit:
    raise ValueError(f"quantized_matmul: {reason}")
  # Scales of a group lie side by side, so that they can be loaded.
  scales = scales[:, 0] if k.groups == 1 else scales.T
  line = k.swizzle // k.out.itemsize
  shape = k.rows, -(-width // line) * line
  if interpret:
    # Where TMA would fill up with zeros or cut off, the interpreter has no
    # memory, and it does not see one memory as numbers of two kinds.
    if k.packed:
      w = unpack(w, formats.get("int4"), depth).astype(jnp.int4)
    size = 1 + (config.cluster is not None)
    shape = (
      k.tiles[0] * config.rows * (size if config.cluster == "rows" else 1),
      k.tiles[1]
      * config.columns
      * (size if config.cluster == "columns" else 1),
    )
    x = jnp.pad(x, ((0, shape[0] - k.rows), (0, 0)))
    w = jnp.pad(w, ((0, shape[1] - width), (0, 0)))
    of_rows = jnp.pad(of_rows, (0, shape[0] - k.rows))
    scales = jnp.pad(
      scales, [(0, 0)] * (scales.ndim - 1) + [(0, shape[1] - width)]
    )

  def kernel(*refs, **s):
    block = _Block(k, refs, s)

    @pl.when(block.me < WORKERS)
    def _():
      plgpu.set_max_registers(_REGISTERS[0], action="increase")
      block.work()

    @pl.when(block.me == WORKERS)
    def _():
      plgpu.set_max_registers(_REGISTERS[1], action="decrease")
      block.load()

  clusters = {}
  if config.cluster:
    clusters = {"cluster": (2,), "cluster_names": ("cluster",)}
  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(shape, k.out),
    grid=(k.clusters,),
    grid_names=("blocks",),
    **clusters,
    num_threads=WORKERS + 1,
    thread_name="warpgroup",
    scratch_types=_scratch(k),
    kernel_name="quantized_matmul_wide",
    compiler_params=compiler_params(),
    interpret=interpret,
  )
  return run(x, w, of_rows, scales)[:rows, :width]
