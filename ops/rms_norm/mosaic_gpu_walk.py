"""What the GPU kernels of `rms_norm` share: a walk over rows.

One warpgroup, 128 threads, walks through some rows of one group of channels. It
takes slabs of (4, W), a line of W channels to each of its four warps: four
rows, or a wide row in four parts, whose sums then meet in shared memory. A slab
is worked on in pieces, of each of which a thread has a few neighbouring
channels. The next rows are loaded while these are at work, or other blocks of
the multiprocessor keep the memory busy.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ops.selective_scan.mosaic_gpu_tile import load, meet

LINES, _LANES = 4, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
  """How a kernel is cut.

  Attributes:
    channels: C / G, of a row.
    split: Whether all four warps share a row, or each has its own.
    vector: Neighbouring channels of a thread, at most 4: more float32 values
      are not loaded at once.
    slabs: Slabs that are loaded at once.
    rows: Rows of a block, a multiple of `step_rows` and at most T.
    ahead: Whether to load the next slabs while these are at work.
    again: Whether to compute again what follows from the inputs once the sums
      of a row are known, and to load the scale again, not to hold either in
      registers.
  """

  channels: int
  split: bool
  vector: int
  slabs: int
  rows: int
  ahead: bool
  again: bool

  @property
  def line(self) -> int:
    """Channels of a line, W."""
    return self.channels // LINES if self.split else self.channels

  @property
  def slab_rows(self) -> int:
    """Rows of a slab."""
    return 1 if self.split else LINES

  @property
  def step_rows(self) -> int:
    """Rows that are loaded at once."""
    return self.slabs * self.slab_rows

  @property
  def steps(self) -> int:
    """How often a block loads rows."""
    return self.rows // self.step_rows

  @property
  def shape(self) -> tuple[int, int]:
    """Of a piece."""
    return LINES, _LANES * self.vector

  @property
  def spans(self) -> list[int]:
    """The first channels of a line's pieces."""
    return list(range(0, self.line, self.shape[1]))

  @property
  def layout(self) -> plgpu.Layout:
    """The layout of a piece, or of a slab."""
    tiling = plgpu.Tiling((self.shape, (self.vector,)))
    return plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)

  def view(self, array: jax.Array, groups: int) -> jax.Array:
    """Returns (T, C) as (T, G, C / G) or (T, G, 4, W), (C,) without T."""
    lines = (LINES,) if self.split else ()
    return array.reshape(*array.shape[:-1], groups, *lines, self.line)

  def sums_type(self, rows: int, groups: int) -> jax.ShapeDtypeStruct:
    """The type of sums over rows, yet to be summed over axes 0 and 1."""
    lines = (1, groups, LINES) if self.split else (LINES, groups)
    shape = (pl.cdiv(rows, self.rows), *lines, self.line)
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  def kernel(
    self, body, rows: int, groups: int, sums: int, name: str, **options
  ):
    """Makes a kernel with a block for all rows and groups.

    Args:
      body: Takes the references and `sums_` for `row_sums`.
      rows: T.
      groups: G.
      sums: Sums of a row.
      name: Of the kernel.
      **options: Of `plgpu.kernel`.
    """
    shape = (2, self.slabs, sums, LINES)
    scratch = {"sums_": plgpu.SMEM(shape, jnp.float32)} if self.split else {}
    return plgpu.kernel(
      body if self.split else functools.partial(body, sums_=None),
      grid=(pl.cdiv(rows, self.rows), groups),
      grid_names=("segment", "group"),
      scratch_types=scratch,
      # Every layout is given, and `row_sums` has the only barrier.
      compiler_params=plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
      ),
      kernel_name=name,
      **options,
    )

  def first(self, rows: int):
    """The block's first row; the last block begins early enough to be whole."""
    return jnp.minimum(lax.axis_index("segment") * self.rows, rows - self.rows)

  def run(self, first, references, step, carry):
    """Calls `step(index, row, slabs, carry)` for all rows of a block.

    Args:
      first: The block's first row.
      references: Those of inputs, by name; see `view`.
      step: Takes the index of the step, its first row, for each slab its inputs
        by name, and the carry. Returns the next carry.
      carry: The first one.

    Returns:
      The last carry.
    """

    def fetch(row):
      near = {name: self.slabs_of(ref, row) for name, ref in references.items()}
      return [
        {name: load(slabs[k], self.layout) for name, slabs in near.items()}
        for k in range(self.slabs)
      ]

    def simple(index, carry):
      row = first + index * self.step_rows
      return step(index, row, fetch(row), carry)

    def ahead(index, both):
      carry, now = both
      row = first + index * self.step_rows
      # Else the compiler would move these loads behind the work on this step.
      following = lax.cond(
        index + 1 < self.steps,
        lambda now: fetch(row + self.step_rows),
        lambda now: now,
        now,
      )
      return step(index, row, now, carry), following

    if self.ahead:
      both = carry, fetch(first)
      return lax.fori_loop(0, self.steps, ahead, both)[0]
    return lax.fori_loop(0, self.steps, simple, carry)

  def slabs_of(self, ref, row) -> list:
    """The slabs of a step; one address serves for all."""
    near = ref.at[pl.ds(row, self.step_rows), lax.axis_index("group")]
    if self.split:
      return [near.at[k] for k in range(self.slabs)]
    return [near.at[pl.ds(LINES * k, LINES)] for k in range(self.slabs)]

  def pieces(self, slab: dict, again: bool = False) -> list[dict]:
    """Cuts a slab's inputs into pieces; `again`, as ones not yet seen."""
    width = self.shape[1]
    found = [
      {name: values[:, span : span + width] for name, values in slab.items()}
      for span in self.spans
    ]
    if again and self.again:
      # An array at a time: the barrier is for those of one vector a thread.
      found = [
        {name: lax.optimization_barrier(v) for name, v in piece.items()}
        for piece in found
      ]
    return found

  def store(self, slab, index: int, values: jax.Array):
    """Stores a piece of a slab."""
    target = slab.at[:, pl.ds(self.spans[index], self.shape[1])]
    target[...] = values.astype(target.dtype)

  def scales(self, ref) -> Callable[[int], jax.Array]:
    """Returns the function from a piece's index to the group's scale there.

    Of wide rows each call loads it, which the first-level cache then has.
    """
    own, width = ref.at[lax.axis_index("group")], self.shape[1]

    def load_piece(index):
      span = pl.ds(self.spans[index], width)
      if self.split:
        return load(own.at[:, span], self.layout)
      return self._repeat(load(own.at[span], self.layout.reduce(0)), 1)

    if self.again:
      return load_piece
    return [load_piece(i) for i in range(len(self.spans))].__getitem__

  def store_sums(self, ref, sums: list[jax.Array]):
    """Stores this block's pieces of sums over rows; see `sums_type`."""
    segment, group = lax.axis_index("segment"), lax.axis_index("group")
    index = (segment, 0, group) if self.split else (segment, slice(None), group)
    for i, total in enumerate(sums):
      self.store(ref.at[index], i, total)

  def zeros(self) -> list[jax.Array]:
    """Sums of pieces to begin with."""
    zeros = jnp.zeros(self.shape, jnp.float32)
    return [plgpu.layout_cast(zeros, self.layout)] * len(self.spans)

  def row_sums(self, index, slabs: list[list[list[jax.Array]]], sums_) -> list:
    """Adds up each row's pieces of several sums, of all slabs of a step.

    Args:
      index: Of the step.
      slabs: For each slab, for each sum, its pieces.
      sums_: Shared memory, or None.

    Returns:
      For each slab the sums, each a number or (4,).
    """
    sums = [
      [jnp.sum(functools.reduce(operator.add, p), axis=1) for p in slab]
      for slab in slabs
    ]
    if not self.split:
      return sums
    # Partial sums of a step are written beside those of the step before, which
    # a slower warpgroup may still read, so that one barrier a step is enough.
    place = lax.rem(index, jnp.int32(2))
    for k, slab in enumerate(sums):
      for i, parts in enumerate(slab):
        sums_.at[place, k, i][...] = parts
    meet()
    return [
      [
        functools.reduce(
          operator.add, [sums_[place, k, i, line] for line in range(LINES)]
        )
        for i in range(len(slab))
      ]
      for k, slab in enumerate(sums)
    ]

  def over_row(self, values) -> jax.Array:
    """A number a row, as a piece; or one number for all rows as it is."""
    return values if self.split else self._repeat(values, 0)

  def since(self, row, slab: int, least) -> jax.Array:
    """Whether a slab's rows are `least` or later; the step begins at `row`."""
    row = row + slab * self.slab_rows
    if self.split:
      return row >= least
    layout = self.layout.reduce(1)
    ids = plgpu.broadcasted_iota(jnp.int32, (LINES,), 0, layout=layout)
    return row + ids >= least

  def _repeat(self, vector, axis):
    spread = lax.broadcast_in_dim(vector, self.shape, (axis,))
    return plgpu.layout_cast(spread, self.layout)
