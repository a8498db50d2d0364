"""Chunks of weights of few bits on their way, through all layers of a step.

What a thread block multiplies with in a step is known beforehand: tiles of
`in_proj` and of `out_proj`, layer after layer. So each of its warpgroups asks
for its chunks of them in this order, as many ahead as shared memory holds, and
for the next ones when it has taken some. Memory does not rest while the blocks
wait for each other: the weights of the next product are on their way.

A thread loads 32 bits of levels at a time, which are no neighbours in the
operand of Hopper's matrix unit. But the order of the rows that are summed over
is free: what they are multiplied with is stored in the order in which threads
find the levels, so that no level has to move from thread to thread.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf, vector

from ops.hopper_tiles import TILE, store, swizzled_levels
from ops.quantized import QTensor, formats
from ops.quantized.quantize import unpack
from ops.quantized_matmul import mosaic_gpu_product as few_bits

CHUNK = few_bits.CHUNK
# Rows of a batch that the matrix unit sees.
ROWS = 8
_LAYOUT = plgpu.Layout
# Chunks of the batch, (ROWS, CHUNK), as they are loaded, by 4-bit and by 8-bit
# weights: each fourth row to a warp.
_FOUR_BITS = _LAYOUT.TILED(
  plgpu.Tiling(((4, 64), (32,), (8,), (4,), (1,))), (-6,), (-5, -4, -2), -1
)
_EIGHT_BITS = _LAYOUT.TILED(plgpu.Tiling(((4, 64), (2,))), (-3,), (-2,), -1)
# The same numbers in the same threads, where they are called what they are
# multiplied as.
_AS_FOUR_BITS = _LAYOUT.TILED(
  plgpu.Tiling(((4, 64), (32,), (16,), (8,), (2,))), (-6,), (-5, -2, -4, -3), -1
)
_AS_EIGHT_BITS = _LAYOUT.TILED(
  plgpu.Tiling(((4, 64), (16,), (8,), (4,), (2,))), (-6,), (-5, -2, -3, -4), -1
)


def batch_layouts(packed: bool):
  """The layouts in which chunks of the batch are loaded, and stored."""
  if packed:
    return _FOUR_BITS, _AS_FOUR_BITS
  return _EIGHT_BITS, _AS_EIGHT_BITS


def store_batch(ref, value, packed: bool, interpret: bool) -> None:
  """Stores a chunk of the batch in the order of its products, as bfloat16."""
  value = value.astype(jnp.bfloat16)
  if not interpret:
    source, target = batch_layouts(packed)

    @plgpu.inline_mgpu(
      arg_types=(source,),
      return_type=plgpu.ShapeDtypeStruct(value.shape, jnp.bfloat16, target),
    )
    def relabel(_, a):
      layout = target.to_mgpu()
      flat = list(a.registers.flat)
      if packed:
        # Both numbers of a pair are registers of their own.
        flat = np.moveaxis(a.registers, -3, -1).reshape(-1, 2)
        flat = [mgpu.utils.vector_concat(list(pair)) for pair in flat]
      return _fragmented(flat, layout, value.shape)

    value = relabel(value)
  store(ref, value)


# A chunk of the only row, (CHUNK,), a number to a thread in the order of its
# products, by 4-bit and by 8-bit weights.
_ROW_FOUR_BITS = _LAYOUT.TILED(
  plgpu.Tiling(((CHUNK,), (32,), (4,), (1,))), (-4,), (-2, -3), -1
)
_ROW_EIGHT_BITS = _LAYOUT.TILED(
  plgpu.Tiling(((CHUNK,), (32,), (16,), (8,), (4,), (2,), (1,))),
  (-7,),
  (-6, -3, -4, -5, -2),
  -1,
)
# The same numbers in the same threads, as both halves of a chunk.
_AS_HALVES = _LAYOUT.TILED(
  plgpu.Tiling(((2, 64), (32,), (1,))), (-4, -3), (-2,), -1
)


def row_layout(packed: bool):
  """The layout in which a chunk of a single row is loaded."""
  return _ROW_FOUR_BITS if packed else _ROW_EIGHT_BITS


def store_row(ref, value, packed: bool) -> None:
  """Stores a chunk of the only row in the order of its products.

  Nobody may read it, and `commit_smem` must follow.

  Args:
    ref: (2, 64) bfloat16, the first row of each half.
    value: (CHUNK,) float32 in `row_layout`.
    packed: Whether it meets weights of 4 bits.
  """

  @plgpu.inline_mgpu(arg_types=(row_layout(packed), plgpu.RefType()))
  def put(_, a, target):
    found = _fragmented(a.registers.flat, _AS_HALVES.to_mgpu(), (2, CHUNK // 2))
    found.store_untiled(target, optimized=False)

  put(value.astype(jnp.bfloat16), ref)


def store_first(ref, total) -> None:
  """Stores the first row of a batch of sums, (TILE,) of (TILE, ROWS)."""

  @plgpu.inline_mgpu(arg_types=(_LAYOUT.WGMMA, plgpu.RefType()))
  def put(_, a, target):
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    constant = lambda value: mgpu.utils.c(value, i32)
    thread = arith.andi(mgpu.utils.thread_idx(), constant(127))
    lane = arith.andi(thread, constant(31))
    first = arith.addi(
      arith.muli(arith.shrui(thread, constant(5)), constant(16)),
      arith.shrui(lane, constant(2)),
    )
    # Four threads have a column, and the first one its first row.
    own = arith.cmpi(
      arith.CmpIPredicate.eq, arith.andi(lane, constant(3)), constant(0)
    )
    branch = scf.IfOp(own)
    with ir.InsertionPoint(branch.then_block):
      for i, pair in enumerate(a.registers.flat):
        at = arith.addi(first, constant(8 * i))
        value = vector.extract(pair, [], [0])
        memref.store(value, target, [arith.index_cast(index, at)])
      scf.yield_([])

  put(total, ref)


def _fragmented(registers, layout, shape):
  found = np.empty(layout.registers_shape(shape), dtype=object)
  for index, register in zip(np.ndindex(found.shape), registers, strict=True):
    found[index] = register
  return mgpu.FragmentedArray(_registers=found, _layout=layout, _is_signed=None)


def _operand(codes, packed: bool) -> list[jax.Array]:
  """Both halves of a chunk of levels, (TILE, CHUNK), as bfloat16."""
  kept = _LAYOUT.WGMMA_UPCAST_4X if packed else _LAYOUT.WGMMA_UPCAST_2X
  values = plgpu.load(codes, layout=kept, optimized=False)
  if not packed:
    values = values.astype(jnp.bfloat16)

  half = values.shape[0], values.shape[1] // 2

  @plgpu.inline_mgpu(
    arg_types=(kept,),
    return_type=[plgpu.ShapeDtypeStruct(half, jnp.bfloat16, _LAYOUT.WGMMA)] * 2,
  )
  def relabel(_, a):
    split = _pairs if packed else _halves
    # By 32 columns or 16, and by the half of 16 rows.
    columns, parts = a.registers.shape[1], a.registers.shape[4]
    words = a.registers.reshape(columns, parts)
    found = []
    for some in np.split(words, 2):
      pairs = [[split(word) for word in row] for row in some]
      flat = [
        pairs[c][h][p]
        for c in range(len(some))
        for p in range(len(pairs[0][0]))
        for h in range(parts)
      ]
      found.append(_fragmented(flat, _LAYOUT.WGMMA.to_mgpu(), half))
    return found

  return relabel(values)


def _halves(word):
  """The two pairs of a vector of four numbers."""
  return [
    mgpu.utils.vector_slice(word, slice(0, 2)),
    mgpu.utils.vector_slice(word, slice(2, 4)),
  ]


def _pairs(word):
  """Levels i and i + 4 of eight 4-bit ones, for i in 0 to 3, as bfloat16.

  The bits of a level, its sign turned, in the mantissa of 128 stand for 136
  more than the level.
  """
  i32 = ir.IntegerType.get_signless(32)
  pair = ir.VectorType.get((2,), ir.BF16Type.get())
  constant = lambda value: mgpu.utils.c(value, i32)
  bits = mgpu.utils.bitcast(word, i32)
  turned = constant(0x43084308)
  offset = mgpu.utils.bitcast(constant(0x43084308), pair)
  found = []
  for i in range(4):
    here = arith.shrui(bits, constant(4 * i)) if i else bits
    # One instruction, which the compiler would make two of, since only one
    # of its operands may be a constant.
    text = "lop3.b32 $0, $1, 0x000f000f, $2, 0x6a;"
    here = llvm.inline_asm(i32, [here, turned], text, "=r,r,r")
    found.append(arith.subf(mgpu.utils.bitcast(here, pair), offset))
  return found


def operands(weight: QTensor, interpret: bool) -> list[jax.Array]:
  """Weights (L, F, D) and scales (L, G, F), (L, F) for one, as `Ring` takes."""
  values, groups = weight.values, weight.num_blocks
  scales = jnp.broadcast_to(weight.scales, (*values.shape[:-1], groups))
  beyond = 0
  if interpret:
    # Where TMA would fill up with zeros, the interpreter has no memory, and it
    # does not see one memory as numbers of two kinds.
    beyond = -values.shape[1] % TILE
    if weight.format.packed:
      values = unpack(values, formats.get("int4"), weight.shape[-2])
      values = values.astype(jnp.int4)
    values = jnp.pad(values, ((0, 0), (0, beyond), (0, 0)))
  if groups == 1:
    # These follow the sum, and are read by threads, whole tiles at a time.
    beyond = -scales.shape[1] % TILE
    return [values, jnp.pad(scales[..., 0], ((0, 0), (0, beyond)))]
  scales = jnp.pad(scales, ((0, 0), (0, beyond), (0, 0)))
  return [values, jnp.swapaxes(scales, 1, 2)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """The product of one kind of a layer, cut up for the teams of warpgroups.

  A unit is a tile of columns, and one of the shares of its rows.

  Attributes:
    depth: D.
    width: F.
    groups: Scales of a column.
    splits: Units that share the rows of a tile.
    neighbours: Whether the teams of a block take neighbouring units, which have
      the same share of the rows; the last block takes the first ones, so that
      blocks that have more of the other product have fewer of this one.
    runs: Whether this kernel does it at all.
  """

  depth: int
  width: int
  groups: int
  splits: int = 1
  neighbours: bool = False
  runs: bool = True

  @property
  def tiles(self) -> int:
    """Of columns."""
    return -(-self.width // TILE)

  @property
  def units(self) -> int:
    """Of all teams."""
    return self.tiles * self.splits * self.runs

  @property
  def chunks(self) -> int:
    """Of a unit."""
    return self.depth // CHUNK // self.splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
  """The chunks of a warpgroup.

  Attributes:
    parts: The products of a layer, in their order.
    packed: Whether weights come as bytes of two levels.
    blocks: Of the grid.
    warpgroups: Of a block.
    teams: Of a block; the warpgroups of one share the chunks of a unit.
    segment: Chunks that are asked for at once.
    stages: Segments of a warpgroup in shared memory.
    joined: Whether a segment is one copy, after which no chunk of it is waited
      for. Its chunks have scales of their own, or none.
    interpret: Whether the kernel is interpreted.
  """

  parts: tuple[Part, ...]
  packed: bool
  blocks: int
  warpgroups: int
  teams: int
  segment: int
  stages: int
  joined: bool
  interpret: bool

  def __post_init__(self):
    """Checks what segments in one copy need."""
    each = {part.depth // CHUNK // part.groups for part in self.scaled_parts}
    if self.joined and each - {1}:
      raise ValueError(
        "mamba2_step: joined segments need a scale for every chunk"
      )

  @property
  def scaled_parts(self) -> list[Part]:
    """Parts whose scales come with the chunks."""
    return [part for part in self.parts if part.groups > 1]

  @property
  def members(self) -> int:
    """Warpgroups of a team."""
    return self.warpgroups // self.teams

  @property
  def scaled(self) -> bool:
    """Whether scales come with the chunks."""
    return bool(self.scaled_parts)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers for `Stream`."""
    ring = self.warpgroups, self.stages, self.segment
    bits = 4 if self.packed else 8
    shape, copies = (*ring, TILE, CHUNK), self.segment
    if self.joined:
      shape, copies = (*ring[:2], TILE, self.segment * CHUNK), 1
    found = {
      "w": swizzled_levels(
        shape, jnp.int8, bits, self.interpret, CHUNK * bits // 8
      ),
      "loaded": plgpu.Barrier(
        num_arrivals=copies * (1 + self.scaled),
        num_barriers=self.warpgroups * self.stages,
      ),
    }
    if self.scaled:
      found["scales"] = plgpu.SMEM((*ring, TILE), jnp.float32)
    return found


class Stream:
  """The chunks of a warpgroup, in the order in which it takes them.

  Attributes:
    ring: What is streamed.
    block: The index of the thread block.
    me: The index of the warpgroup.
    team: Of this warpgroup, in the block.
    member: Which of its team this warpgroup is.
    units: Of this team in a layer, a number for each part.
    most: Units of the team of this block that has most of each part.
  """

  def __init__(self, ring: Ring, refs, span, block, me, s):
    """Counts the units of this warpgroup's team; `begin` asks for the first.

    Args:
      ring: What is streamed.
      refs: For each part what `operands` gave.
      span: The first layer, and the one behind the last.
      block: The index of the thread block.
      me: The index of the warpgroup.
      s: Shared memory by name, with that of `Ring.scratch`.
    """
    self.ring, self.me, self._refs, self.block = ring, me, refs, block
    self.team = lax.div(me, jnp.int32(ring.members))
    self.member = lax.rem(me, jnp.int32(ring.members))
    aliased = ring.packed and not ring.interpret
    self._stored, self._codes = s["w"] if aliased else (s["w"], s["w"])
    self._scales, self._loaded = s.get("scales"), s["loaded"]
    self._first, self._end = span[0], span[1]
    workers = ring.blocks * ring.teams
    count = lambda part, place: lax.div(
      part.units - place + workers - 1, workers
    )
    self.units, self.most, self._segments = [], [], []
    for part in ring.parts:
      self.units.append(count(part, self._place(part, self.team)))
      self.most.append(count(part, self._place(part, 0)))
      self._segments.append(self._share(part) // ring.segment)
    self._each = sum(u * n for u, n in zip(self.units, self._segments))
    self._total = self._each * (span[1] - span[0])
    # Layers, and segments, from a segment to the one that takes its place.
    each, further = jnp.maximum(self._each, 1), jnp.int32(ring.stages)
    self._further = lax.div(further, each), lax.rem(further, each)

  def _place(self, part, team):
    """Of a team of this block among those that take units."""
    if part.neighbours:
      last = self.ring.blocks - 1
      return (last - self.block) * self.ring.teams + team
    return team * self.ring.blocks + self.block

  def _share(self, part):
    """Chunks of a unit that are a warpgroup's: all have as many."""
    return part.chunks // self.ring.members

  def unit(self, index: int, k, team=None) -> tuple[jax.Array, jax.Array]:
    """The first column of a team's kth unit of a part, and its split."""
    part = self.ring.parts[index]
    place = self._place(part, self.team if team is None else team)
    unit = place + k * self.ring.blocks * self.ring.teams
    if part.splits == 1:
      return unit * TILE, jnp.int32(0)
    column = lax.rem(unit, jnp.int32(part.tiles)) * TILE
    return column, lax.div(unit, jnp.int32(part.tiles))

  def begin(self) -> None:
    """Asks for the first segments."""

    @pl.loop(0, self.ring.stages)
    def _(slot):
      self._fetch(slot, slot)

  def _fetch(self, n, slot):
    """Asks for the nth segment of all, if there is one."""
    layer = self._first + lax.div(n, self._each)
    at = lax.rem(n, self._each)
    for index, segments in enumerate(self._segments):
      size = self.units[index] * segments
      mine = (n < self._total) & (at >= 0) & (at < size)
      pl.when(mine)(
        lambda index=index, at=at: self._copy(index, layer, at, slot)
      )
      at -= size

  def _copy(self, index, layer, at, slot):
    """Asks for a segment, of a part's units in a layer."""
    column, first = self._segment(index, at)
    self._copy_from(index, layer, column, first, slot)

  def _segment(self, index, at):
    """A segment's column and first chunk."""
    part, segments = self.ring.parts[index], jnp.int32(self._segments[index])
    column, split = self.unit(index, lax.div(at, segments))
    before = lax.rem(at, segments)
    first = split * part.chunks + self.member * self._share(part)
    return column, first + before * self.ring.segment

  def _find(self, layer, at) -> tuple[jax.Array, ...]:
    """Where a segment is, less than as many past the end as a layer has.

    Returns:
      Its layer; its part, or -1 if there is no such segment; its column, and
      its first chunk.
    """
    over = at >= self._each
    layer += over.astype(jnp.int32)
    at -= jnp.where(over, self._each, 0)
    exists = (layer < self._end) & (at < self._each)
    index, found, passed = jnp.int32(0), self._segment(0, at), 0
    for i in range(1, len(self.ring.parts)):
      passed += self.units[i - 1] * self._segments[i - 1]
      later = at >= passed
      index = jnp.where(later, i, index)
      pairs = zip(self._segment(i, at - passed), found)
      found = [jnp.where(later, new, old) for new, old in pairs]
    return layer, jnp.where(exists, index, -1), *found

  def refill(self, index, layer, k, i=None) -> None:
    """Asks for what comes in the place of a segment of a unit, read by all.

    Args:
      index: Of the part.
      layer: In which it is.
      k: Which of this team's units it is.
      i: Which segment of the unit; by default the last.
    """
    at = k * self._segments[index]
    at += self._segments[index] - 1 if i is None else i
    if index:
      at += self.units[0] * self._segments[0]
    slot = self._slot((layer - self._first) * self._each + at)
    further, beyond = self._further
    layer, own, column, first = self._find(layer + further, at + beyond)
    for other in range(len(self.ring.parts)):
      pl.when(own == other)(
        lambda other=other: self._copy_from(other, layer, column, first, slot)
      )

  def _slot(self, n):
    """Where the nth segment of all lies."""
    return lax.rem(n, jnp.int32(self.ring.stages))

  def _copy_from(self, index, layer, column, first, slot):
    """Asks for a segment of a part, from a chunk on."""
    ring, part = self.ring, self.ring.parts[index]
    w_ref, scales_ref = self._refs[index]
    width = self._stored.shape[-1]
    loaded = self._loaded.at[self.me * ring.stages + slot]
    own = pl.ds(column, TILE)
    if ring.joined:
      width = width // ring.segment
      some = pl.ds(first * width, ring.segment * width)
      plgpu.copy_gmem_to_smem(
        w_ref.at[layer, own, some], self._stored.at[self.me, slot], loaded
      )
      if part.groups > 1:
        plgpu.copy_gmem_to_smem(
          scales_ref.at[layer, pl.ds(first, ring.segment), own],
          self._scales.at[self.me, slot],
          loaded,
        )
      elif ring.scaled:
        plgpu.barrier_arrive(loaded)
      return

    @pl.loop(0, ring.segment)
    def _(j):
      chunk = first + j
      plgpu.copy_gmem_to_smem(
        w_ref.at[layer, own, pl.ds(chunk * width, width)],
        self._stored.at[self.me, slot, j],
        loaded,
      )
      if part.groups > 1:
        group = lax.div(chunk, jnp.int32(part.depth // CHUNK // part.groups))
        plgpu.copy_gmem_to_smem(
          scales_ref.at[layer, group, own],
          self._scales.at[self.me, slot, j],
          loaded,
        )
      elif ring.scaled:
        plgpu.barrier_arrive(loaded)

  def multiply(self, index: int, layer, k, x_ref) -> jax.Array:
    """This warpgroup's share of a unit; what comes later is asked for.

    Args:
      index: Of the part.
      layer: In which it is.
      k: Which of this team's units it is.
      x_ref: Chunks of the batch in shared memory, (chunks, ROWS, CHUNK), each
        of `store_batch`.

    Returns:
      (TILE, ROWS) float32, without the scale of a column that has but one.
    """
    ring, part = self.ring, self.ring.parts[index]
    segments = self._segments[index]
    base = (layer - self._first) * self._each + k * segments
    if index:
      base += self.units[0] * self._segments[0]
    first = self.member * self._share(part)

    def each_segment(i, total):
      n = base + i
      slot = self._slot(n)
      plgpu.barrier_wait(self._loaded.at[self.me * ring.stages + slot])

      def refill(j):
        if ring.joined:
          return

        # The segment before has been read by all threads. To ask for another
        # one takes a while, in which this one is multiplied.
        @pl.when((j == 0) & (n > 0))
        def _():
          self._fetch(n - 1 + ring.stages, self._slot(n - 1))

      def each_chunk(j, total):
        codes = self._codes.at[self.me, slot]
        found = self._product(
          codes.at[:, pl.ds(j * CHUNK, CHUNK)] if ring.joined else codes.at[j],
          x_ref.at[first + i * ring.segment + j],
          lambda: refill(j),
        )
        if part.groups > 1:
          found *= few_bits.spread(self._scales.at[self.me, slot, j], 0, ROWS)
        return total + found

      total = lax.fori_loop(
        jnp.int32(0), jnp.int32(ring.segment), each_chunk, total
      )
      if ring.joined and segments > 1:
        pl.when(i < segments - 1)(lambda: self.refill(index, layer, k, i))
      return total

    zero = plgpu.layout_cast(
      jnp.zeros((TILE, ROWS), jnp.float32), _LAYOUT.WGMMA
    )
    if segments == 1:
      return each_segment(jnp.int32(0), zero)
    return lax.fori_loop(jnp.int32(0), jnp.int32(segments), each_segment, zero)

  def _product(self, codes, x, meanwhile) -> jax.Array:
    """Multiplies a chunk, (TILE, CHUNK), by one of the batch: float32."""
    if self.ring.interpret:
      meanwhile()
      levels = few_bits.operand(codes, packed=self.ring.packed)
      return jnp.dot(levels, x[...].T, preferred_element_type=jnp.float32)
    halves = _operand(codes, self.ring.packed)

    def run(*sums):
      # Products that add to one sum wait for each other, so there are two.
      for i, (one, half) in enumerate(zip(sums, halves)):
        own = pl.ds(i * CHUNK // 2, CHUNK // 2)
        plgpu.wgmma(one, half, x.at[:, own].T)
      meanwhile()
      plgpu.wgmma_wait(0)
      return sums[0][...] + sums[1][...]

    return pl.run_scoped(run, *[plgpu.ACC((TILE, ROWS), jnp.float32)] * 2)
