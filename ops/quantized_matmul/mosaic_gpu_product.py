"""The skinny product with weights of few bits, of which Hopper kernels consist.

With few rows the time is that of reading the weights. So they are read in the
bits that they are kept in, and many chunks ahead of their use. Hopper's matrix
unit (wgmma) takes one operand from registers, where 4-bit and 8-bit levels
become bfloat16, which holds them exactly. That operand has 64 rows, of which
few tokens would waste most: the product is transposed, so that columns of the
weights are its rows, and any multiple of 8 tokens its columns.

Several warpgroups of a thread block take chunks of the summed axis in turn,
each with a ring of its own in shared memory: one converts while others
multiply. The sums of a chunk, float32, are multiplied by the scale of its
group, so scales are never rounded. At last the warpgroups add up through shared
memory, from where whole lines of memory are written.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops.hopper_tiles import (
  ROWS,
  SUMS,
  TILE,
  load,
  store,
  swizzled,
  swizzled_levels,
)
from ops.quantized import formats
from ops.quantized.quantize import unpack
from ops.quantized_matmul import mosaic_gpu_lookup

# Of the summed axis, that a warpgroup takes at a time.
CHUNK = 128
# Values of a group of which a chunk has several.
SMALL = (16, 32)
# Scales of a column that TMA copies at once.
MOST_SCALES = 256
_LAYOUT = plgpu.Layout


def chunk_of(depth: int, groups: int) -> int:
  """The chunk of D values in so many groups."""
  size = depth // groups
  if size in SMALL:
    return CHUNK if depth % CHUNK == 0 else 64
  return CHUNK if size % CHUNK == 0 else 64


def unfit(depth: int, groups: int, *, small: bool = False) -> str | None:
  """Returns None if the product takes D in so many groups, else why not.

  Args:
    depth: D.
    groups: Of D.
    small: Whether several groups may lie in a chunk.
  """
  if depth % groups or depth % 64:
    return f"needs groups of a multiple of 64, not {groups} of {depth} values"
  size = depth // groups
  if size % 64 and not (small and size in SMALL):
    return f"needs groups of a multiple of 64, not {groups} of {depth} values"
  return None


def _inner(depth: int, groups: int) -> int:
  """Groups in a chunk of several; 0 where a chunk has one, or a part of it."""
  size = depth // groups
  return chunk_of(depth, groups) // size if size in SMALL else 0


def groups_of_split(depth: int, groups: int, splits: int) -> int:
  """Groups of a column in each of so many splits; the last has the rest."""
  if inner := _inner(depth, groups):
    return inner * -(-(groups // inner) // splits)
  return -(-groups // splits)


def scales_of_split(depth: int, groups: int, splits: int, line: int) -> int:
  """Scales of a column that a split loads: whole lines of so many, as TMA does.

  A line is 16 bytes.
  """
  if groups == 1:
    return 0
  own = groups_of_split(depth, groups, splits)
  # The first of a split may be the last one of its line.
  before = line - 1 if splits > 1 and own % line else 0
  return line * -(-(own + before) // line)


def rings(
  free: int, *, rows: int, depth: int, columns: int, groups: int, bits: int,
  splits: int = 1, parts: int = 1,
) -> tuple[int, int]:  # fmt: skip
  """Warpgroups of a thread block, and the chunks of each in shared memory.

  Args:
    free: Bytes of shared memory.
    rows: As of `Product`, as the others but `bits`.
    depth:
    columns:
    groups:
    bits: Of a level.
    splits:
    parts:
  """
  chunk = chunk_of(depth, groups)
  ring = columns * chunk * bits // 8 + 2 * rows * chunk
  for warpgroups in (4, 2, 1):
    stages = (free // warpgroups - 4 * rows * (columns + 4)) // ring
    whole = parts == 1 or depth // chunk % (parts * warpgroups) == 0
    if whole and (stages >= 2 or warpgroups == 1):
      break
  most = -(-depth // (chunk * splits * warpgroups))
  return warpgroups, max(2, min(stages, 4, most))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """x (N, D) @ W (F, D).T, of which a thread block gives some columns.

  Attributes:
    rows: N, a multiple of 8.
    depth: D.
    groups: Scales of a column of the weights.
    packed: Whether weights come as bytes of two levels.
    warpgroups: Of a thread block, which take chunks in turn.
    stages: Chunks in the ring of each.
    splits: Thread blocks that share D.
    tiles: Of TILE columns, of a thread block.
    parts: Of D, each with a factor of its own for every row.
    table: The bits of 16 levels, where codes of 4 bits are indices of them, see
      `mosaic_gpu_lookup`; None where codes are levels.
    special: Whether each group has a level of its own for the last index; these
      come beside the scales.
    scale_dtype: float32 or bfloat16.
    overlap: Whether the kernel may start before the one in front of it ends.
    interpret: Whether the kernel is interpreted. The interpreter knows no
      operand in registers: a plain product stands in for it.
    by_tiles: Whether each tile of columns is copied by itself, since they may
      be of several matrices.
  """

  rows: int
  depth: int
  groups: int
  packed: bool
  warpgroups: int
  stages: int
  splits: int = 1
  tiles: int = 1
  parts: int = 1
  table: tuple[int, ...] | None = None
  special: bool = False
  scale_dtype: jnp.dtype = jnp.dtype(jnp.float32)
  overlap: bool = False
  interpret: bool = False
  by_tiles: bool = False

  def __post_init__(self):
    """Checks what would else wait forever, or leave out some of D."""
    if unfit(self.depth, self.groups, small=True) or self.stages < 2:
      raise ValueError(
        f"{self.groups} groups of {self.depth} values, or {self.stages} stages,"
        " do not fit"
      )
    if self.inner and self.table is None:
      raise ValueError(f"{self.groups} groups of {self.depth} need a table")
    if self.scales > MOST_SCALES:
      raise ValueError(
        f"{self.groups} groups of {self.depth} values in {self.splits} splits:"
        f" {self.scales} scales a split, of {MOST_SCALES} at most"
      )
    if self.parts > 1 and (
      self.splits > 1 or self.chunks % (self.parts * self.warpgroups)
    ):
      raise ValueError(
        f"{self.parts} parts of {self.chunks} chunks do not fit"
        f" {self.splits} splits and {self.warpgroups} warpgroups"
      )

  @property
  def workers(self) -> int:
    """Warpgroups that finish a part of the result."""
    return 1

  @property
  def finished(self) -> tuple[int, int]:
    """Rows and columns of such a part."""
    return self.rows, self.columns

  @property
  def exchange(self) -> bool:
    """Whether the thread blocks that share D each finish some rows."""
    return False

  def own_rows(self, me, split=0):
    """Rows that a warpgroup of such a thread block finishes."""
    del me, split
    return pl.ds(0, self.rows)

  @property
  def columns(self) -> int:
    """Of a thread block."""
    return TILE * self.tiles

  @property
  def copied(self) -> int:
    """Columns that are copied at once."""
    return TILE if self.by_tiles else self.columns

  @property
  def chunk(self) -> int:
    """Of D, that a warpgroup takes at a time."""
    return chunk_of(self.depth, self.groups)

  @property
  def chunks(self) -> int:
    """Of D."""
    return self.depth // self.chunk

  @property
  def inner(self) -> int:
    """Groups in a chunk, whose scales multiply levels; 0 where it has one."""
    return _inner(self.depth, self.groups)

  @property
  def groups_of_split(self) -> int:
    """Of a column; the last split has the rest."""
    return groups_of_split(self.depth, self.groups, self.splits)

  @property
  def scales(self) -> int:
    """Scales of a column that a split loads."""
    return scales_of_split(self.depth, self.groups, self.splits, self.line)

  @property
  def line(self) -> int:
    """Scales in 16 bytes."""
    return 16 // self.scale_dtype.itemsize

  @property
  def share(self) -> int:
    """Chunks of a split; the last one has the rest."""
    if self.groups == 1 or self.inner:
      return -(-self.chunks // self.splits)
    return self.groups_of_split * (self.chunks // self.groups)

  def operands(
    self,
    w: jax.Array,
    scales: jax.Array,
    columns: int,
    special: jax.Array | None = None,
  ) -> list[jax.Array]:
    """The weights and their scales, as `run` takes them.

    Args:
      w: (..., F, D) int8, or (..., F, D / 2) uint8.
      scales: (..., F, G) float32.
      columns: Of all thread blocks, at least F.
      special: (..., F, G) levels of groups, of the scales' dtype.
    """

    def padded(a, columns, width):
      beyond = (0, columns - a.shape[-2]), (0, width - a.shape[-1])
      return jnp.pad(a, ((0, 0),) * (a.ndim - 2) + beyond)

    rows = w.shape[-2]
    width = -(-self.groups // self.line) * self.line
    if self.interpret:
      # Where TMA would fill up with zeros, the interpreter has no memory, and
      # it does not see one memory as numbers of two kinds.
      rows = columns
      width = self.groups_of_split * (self.splits - 1) // self.line * self.line
      width += self.scales
      if self.packed:
        w = unpack(w, formats.get("int4"), self.depth).astype(jnp.int4)
      w = padded(w, rows, w.shape[-1])
    if not self.scales:
      # These follow the sum, and are read by threads.
      return [w, padded(scales, columns, 1)[..., 0]]
    beside = [scales] if special is None else [scales, special]
    return [w, *(padded(one, rows, width) for one in beside)]

  def launch(self) -> dict[str, Any]:
    """What `plgpu.kernel` is to be told."""
    return {"num_threads": self.warpgroups, "thread_name": "warpgroup"}

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers for `run`."""
    ring = self.warpgroups, self.stages
    weights = (*ring, self.columns, self.chunk)
    bits = 4 if self.packed else 8
    x = swizzled((*ring, self.rows, self.chunk), jnp.bfloat16, 16)
    # Four more than needed let the threads of a warp store to all banks.
    sums = plgpu.SMEM(
      (self.warpgroups, self.rows, self.columns + 4), jnp.float32
    )
    copies = self.columns // self.copied
    scratch = {
      "w": swizzled_levels(weights, jnp.int8, bits, self.interpret),
      "x": x,
      "sums": sums,
      "loaded": plgpu.Barrier(
        num_arrivals=copies + 1, num_barriers=self.warpgroups * self.stages
      ),
      "done": plgpu.Barrier(num_arrivals=self.warpgroups),
    }
    if self.scales:
      kept = plgpu.SMEM((self.columns, self.scales), self.scale_dtype)
      scratch["scales"] = kept
      scratch["scales_loaded"] = plgpu.Barrier(
        num_arrivals=copies * (1 + self.special)
      )
      if self.special:
        scratch["special"] = kept
    if self.parts > 1:
      scratch["factors"] = plgpu.SMEM(
        (self.warpgroups, self.parts, self.rows), jnp.float32
      )
    return scratch

  def run(
    self,
    x_ref: Any,
    refs: Sequence[Any],
    column: jax.Array,
    s: dict[str, Any],
    *,
    prefix: tuple[jax.Array, ...] = (),
    split: int | jax.Array = 0,
    prepare: Callable[[jax.Array], tuple[Any, Sequence[jax.Array]]],
    finish: Callable[[jax.Array, Any], None],
    pick: Callable[[int, Callable[[Any, Any], None]], None] | None = None,
  ) -> None:
    """Multiplies; the first of the warpgroups takes the result.

    Args:
      x_ref: (N, D) bfloat16.
      refs: What `operands` gave.
      column: The first of the thread block.
      s: The kernel's shared memory by name, with that of `scratch`.
      prefix: Index of the axes in front of (F, D).
      split: Which of the thread blocks that share D this is.
      prepare: Called with the warpgroup's index when the weights are on their
        way and what other kernels wrote can be read. Returns what `finish`
        takes, and for several parts the factor of each, (N,).
      finish: Called in the first warpgroup with the product, (N, columns)
        float32 in the layout ROWS, and what `prepare` returned.
      pick: Where there are weights of several matrices, called with the number
        of a tile of columns and a function, which it calls, of operands and the
        first column there; needs `by_tiles`. Else those of `refs` from `column`
        are taken. The only scales of columns, though, are the last of `refs`,
        those of the thread block from `column` on.
    """
    me = lax.axis_index("warpgroup")
    x_s, sums_s = s["x"], s["sums"]
    # The group of the first scale that is loaded.
    first_scale = split * self.groups_of_split // self.line * self.line
    layer = lambda ref: ref.at[prefix] if prefix else ref
    if pick is None:
      pick = lambda j, copy: copy(refs, column + j * self.copied)

    def fetch(copy):
      """Calls `copy` with operands, the first column, and the place of it."""
      for j in range(self.columns // self.copied):
        here = pl.ds(j * self.copied, self.copied)
        pick(j, functools.partial(copy, here))

    if self.scales:

      def fetch_scales(here, refs, column):
        own = (
          pl.ds(column, self.copied),
          pl.ds(first_scale, self.scales),
        )
        for name, ref in zip(["scales", "special"], refs[1:]):
          target = s[name].at[here] if self.by_tiles else s[name]
          plgpu.copy_gmem_to_smem(
            layer(ref).at[own], target, s["scales_loaded"]
          )

      pl.when(me == 0)(lambda: fetch(fetch_scales))

    # What TMA writes, and how it is read.
    aliased = self.packed and not self.interpret
    bytes_s, codes_s = s["w"] if aliased else (s["w"], s["w"])
    width = bytes_s.shape[-1]
    first = split * self.share
    end = jnp.minimum(first + self.share, self.chunks)
    # Of this warpgroup, which takes every so manyth chunk.
    steps = lax.div(end - first - me + self.warpgroups - 1, self.warpgroups)

    def chunk_at(i):
      return first + i * self.warpgroups + me

    def barrier(slot):
      return s["loaded"].at[me * self.stages + slot]

    def fetch_weights(i, slot):
      def copy(here, refs, column):
        own = pl.ds(column, self.copied), pl.ds(chunk_at(i) * width, width)
        target = bytes_s.at[me, slot]
        plgpu.copy_gmem_to_smem(
          layer(refs[0]).at[own],
          target.at[here] if self.by_tiles else target,
          barrier(slot),
        )

      fetch(copy)

    def fetch_rows(i, slot):
      own = x_ref.at[:, pl.ds(chunk_at(i) * self.chunk, self.chunk)]
      plgpu.copy_gmem_to_smem(own, x_s.at[me, slot], barrier(slot))

    def begin(fetch):
      for i in range(self.stages):
        pl.when(i < steps)(lambda i=i: fetch(jnp.int32(i), i))

    begin(fetch_weights)
    if self.overlap and not self.interpret:
      plgpu.griddepcontrol_launch_dependents()
      plgpu.griddepcontrol_wait()
    begin(fetch_rows)
    of_columns = None
    if not self.scales:
      own = layer(refs[-1]).at[pl.ds(column, self.columns)]
      of_columns = load(own, ROWS.reduce(0))
    prepared, factors = prepare(me)
    if self.parts > 1:
      for k, factor in enumerate(factors):
        store(s["factors"].at[me, k], factor)
      plgpu.commit_smem()
    if self.scales:
      plgpu.barrier_wait(s["scales_loaded"])

    def refill(i, slot):
      @pl.when(i + self.stages < steps)
      def _():
        fetch_weights(i + self.stages, slot)
        fetch_rows(i + self.stages, slot)

    def step(i, totals):
      slot = lax.rem(i, jnp.int32(self.stages))
      plgpu.barrier_wait(barrier(slot))
      if self.inner:
        scale = chunk_at(i) * self.inner
      else:
        scale = lax.div(chunk_at(i), jnp.int32(self.chunks // self.groups))
      scale -= first_scale
      found = []
      for t, total in enumerate(totals):
        own = pl.ds(t * TILE, TILE)
        # Of each of the groups in the chunk.
        each = max(self.inner, 1)
        beside = {
          name: [
            spread(s[name].at[own, scale + k], 0, self.chunk // each)
            for k in range(each)
          ]
          for name, there in (
            ("special", self.special),
            ("scales", self.inner),
          )
          if there
        }
        part = multiply(
          codes_s.at[me, slot, own],
          x_s.at[me, slot],
          packed=self.packed,
          table=self.table,
          beside=beside,
          interpret=self.interpret,
        )
        if self.scales and not self.inner:
          factor = spread(s["scales"].at[own, scale], 0, self.rows)
          part *= factor.astype(jnp.float32)
        found.append(total + part)
      refill(i, slot)
      return tuple(found)

    zero = plgpu.layout_cast(
      jnp.zeros((TILE, self.rows), jnp.float32), _LAYOUT.WGMMA
    )
    zeros = (zero,) * self.tiles

    def sums_of(first, last):
      return lax.fori_loop(first, last, step, zeros)

    if self.parts == 1:
      totals = sums_of(jnp.int32(0), steps)
    else:
      totals, each = zeros, self.chunks // self.parts // self.warpgroups
      for k in range(self.parts):
        sums = sums_of(jnp.int32(k * each), jnp.int32((k + 1) * each))
        factor = spread(s["factors"].at[me, k], 1, self.rows)
        totals = [a + factor * b for a, b in zip(totals, sums)]
    for t, total in enumerate(totals):
      own = sums_s.at[me, :, pl.ds(t * TILE, TILE)]
      store(own.T, plgpu.layout_cast(total, SUMS))
    plgpu.barrier_arrive(s["done"])
    plgpu.barrier_wait(s["done"])

    @pl.when(me == 0)
    def _():
      own = pl.ds(0, self.columns)
      values = [
        load(sums_s.at[g, pl.ds(0, self.rows), own], ROWS)
        for g in range(self.warpgroups)
      ]
      value = sum(values[1:], values[0])
      if of_columns is not None:
        spread = lax.broadcast_in_dim(of_columns, value.shape, (1,))
        value *= plgpu.layout_cast(spread, ROWS)
      finish(value, prepared)


def multiply(
  codes,
  x,
  *,
  packed: bool,
  interpret: bool,
  table: tuple[int, ...] | None = None,
  beside: Mapping[str, Sequence[jax.Array]] | None = None,
) -> jax.Array:
  """Multiplies a tile (TILE, chunk) of levels by x.T: (TILE, N) float32.

  Args:
    codes: In shared memory, int8 or int4.
    x: In shared memory, (N, chunk) bfloat16.
    packed: Whether the levels are int4.
    interpret: Whether the kernel is interpreted.
    table: Of levels, where the int4 are indices of them.
    beside: "special" and "scales" as `mosaic_gpu_lookup.lookup` takes them,
      (TILE, chunk / n) each, of the scales' dtype.
  """
  if table is None:
    return product(operand(codes, packed=packed), x, interpret)
  beside = {
    name: [one.astype(jnp.bfloat16) for one in own]
    for name, own in (beside or {}).items()
  }
  look = mosaic_gpu_lookup.plain if interpret else mosaic_gpu_lookup.lookup
  left = look(loaded(codes, packed=packed), table, **beside)
  return product(left, x, interpret)


def operand(codes, *, packed: bool) -> jax.Array:
  """A tile of levels in shared memory, as wgmma takes them in registers."""
  return loaded(codes, packed=packed).astype(jnp.bfloat16)


def loaded(codes, *, packed: bool) -> jax.Array:
  """A tile of codes in registers, where wgmma wants their levels."""
  # A thread loads 32 bits at a time, and gets others' levels as wgmma wants.
  layout = _LAYOUT.WGMMA_UPCAST_4X if packed else _LAYOUT.WGMMA_UPCAST_2X
  values = plgpu.load(codes, layout=layout, optimized=False)
  return plgpu.layout_cast(values, _LAYOUT.WGMMA)


def product(left: jax.Array, x, interpret: bool) -> jax.Array:
  """Multiplies an operand in registers, (TILE, chunk), by x.T: float32."""
  if interpret:
    return jnp.dot(left, x[...].T, preferred_element_type=jnp.float32)

  def run(sums):
    plgpu.wgmma(sums, left, x.T)
    plgpu.wgmma_wait(0)
    return sums[...]

  return pl.run_scoped(run, plgpu.ACC((TILE, x.shape[0]), jnp.float32))


def spread(ref, axis: int, rows: int) -> jax.Array:
  """Numbers along an axis of a tile, (TILE, rows)."""
  layout = _LAYOUT.WGMMA.reduce(1 - axis)
  value = plgpu.load(ref, layout=layout, optimized=False)
  value = lax.broadcast_in_dim(value, (TILE, rows), (axis,))
  return plgpu.layout_cast(value, _LAYOUT.WGMMA)
