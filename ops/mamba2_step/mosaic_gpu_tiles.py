"""The product of many rows with weights of few bits: a tile a warpgroup.

Each block of columns reads x out of the L2 cache. With 64 rows these are five
times the bytes of its 4-bit weights if the block has 64 columns. So blocks are
wide: each warpgroup has a tile of columns of its own, and all share the chunks
of x. A half of a chunk of weights becomes bfloat16 in registers while the other
one is multiplied.

Wide blocks are few. So the blocks of a cluster share the summed axis; each then
finishes a share of the rows, of which the others send it their sums.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper
from ops.hopper_tiles import (
  ROWS,
  SUMS,
  TILE,
  load,
  repeat,
  store,
  swizzled,
  swizzled_levels,
)
from ops.quantized_matmul import mosaic_gpu_product as few_bits

# Warpgroups of which TMA copies the columns at once.
MOST_WARPGROUPS = 4
# Blocks of a cluster, and clusters that an H200 was found to hold at once or,
# of four, that its processors allow when those of eight are so many.
_CLUSTERS = {1: hopper.PROCESSORS, 2: hopper.PROCESSORS // 2, 4: 30, 8: 15}
# What was found best on an H200 with 64 rows of 2.7B: one more block of a
# cluster costs as much as so many tiles of a chunk, .39 microseconds to .23,
# and four warpgroups take more than three or two.
_EXCHANGE = 1.7
_WARPGROUPS = 2, 3
_MOST_STAGES = 6
# Of a chunk.
_PARTS = 2
# Bytes of a column of weights that are prefetched at a time.
_LINE = 256


def configure(
  *, rows: int, depth: int, width: int, groups: int, bits: int, beside: int = 0
) -> tuple[int, int, int] | None:
  """Warpgroups, splits and stages of the Product with least to do a block.

  Args:
    rows: N.
    depth: D.
    width: F.
    groups: Of D.
    bits: Of a level.
    beside: Bytes for each number that a block finishes.

  Returns:
    None where there is no such Product all blocks of which run at once.
  """
  chunk = few_bits.chunk_of(depth, groups)
  chunks = depth // chunk

  def stages(warpgroups, splits):
    """Chunks that shared memory holds."""
    columns = warpgroups * TILE
    scales = few_bits.scales_of_split(depth, groups, splits, 4)
    parts = beside + 4 * (splits - 1)
    free = hopper.SHARED_MEMORY - 1024 - 4 * columns * scales
    free -= parts * columns * rows // splits
    fit = free // (chunk * (columns * bits // 8 + 2 * rows))
    return min(fit // 2 * 2, _MOST_STAGES, -(-chunks // splits))

  choices = [
    (warpgroups, splits)
    for warpgroups in _WARPGROUPS
    for splits, clusters in _CLUSTERS.items()
    if rows % (8 * splits) == 0
    and chunks % splits == 0
    and (groups == 1 or groups % splits == 0)
    and -(-width // (warpgroups * TILE)) <= clusters
    and stages(warpgroups, splits) >= 2
  ]
  if not choices:
    return None
  best = min(choices, key=lambda c: c[0] * chunks / c[1] + _EXCHANGE * c[1])
  return *best, stages(*best)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product(few_bits.Product):
  """x (N, D) @ W (F, D).T, of which a warpgroup gives TILE columns.

  Attributes are those of the parent, but `tiles`, which is `warpgroups`, and
  `stages`, which are of all warpgroups; D has one part.

  Attributes:
    exchange: Whether the thread blocks that share D are a cluster, with an axis
      "split", and each finishes its share of the rows.
  """

  exchange: bool = False

  def __post_init__(self):
    """Checks what would else wait forever, or be left out."""
    super().__post_init__()
    if not 1 <= self.warpgroups == self.tiles <= MOST_WARPGROUPS:
      raise ValueError(f"{self.tiles} tiles, {self.warpgroups} warpgroups")
    if self.parts > 1 or self.table is not None:
      raise ValueError("a tile a warpgroup is for levels in one part")
    if self.share * (self.splits - 1) >= self.chunks:
      raise ValueError(f"{self.chunks} chunks in {self.splits} splits")
    # Tiles that clusters exchange are eight rows.
    if self.exchange and self.rows % (8 * self.splits):
      raise ValueError(f"{self.splits} blocks do not share {self.rows} rows")

  @property
  def workers(self) -> int:
    """Warpgroups that finish a part of the result."""
    return self.warpgroups

  @property
  def finished(self) -> tuple[int, int]:
    """Rows and columns of such a part."""
    return self.rows // (self.splits if self.exchange else 1), TILE

  def own_rows(self, me, split=0):
    """Rows that a warpgroup of such a thread block finishes."""
    del me
    size = self.finished[0]
    return pl.ds(split * size if self.exchange else 0, size)

  @property
  def depth_of_ring(self) -> int:
    """Chunks in shared memory."""
    return min(self.stages, self.share)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers for `run`."""
    stages = self.depth_of_ring
    bits = 4 if self.packed else 8
    x = swizzled((stages, self.rows, self.chunk), jnp.bfloat16, 16)
    # Four more than needed let the threads of a warp store to all banks.
    sums = plgpu.SMEM((self.warpgroups, self.rows, TILE + 4), jnp.float32)
    scratch = {
      "w": swizzled_levels(
        (stages, self.columns, self.chunk), jnp.int8, bits, self.interpret
      ),
      # The interpreter sees no memory as two arrays.
      **(
        {"x": x, "sums": sums}
        if self.interpret
        else {"x": plgpu.RefUnion(x, sums)}
      ),
      "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      "read": plgpu.Barrier(num_arrivals=self.warpgroups),
    }
    if stages < self.share:
      scratch["consumed"] = plgpu.Barrier(
        num_arrivals=self.warpgroups, num_barriers=stages
      )
    if self.scales:
      scratch["scales"] = plgpu.SMEM((self.columns, self.scales), jnp.float32)
      scratch["scales_loaded"] = plgpu.Barrier()
    if self.exchange:
      others = (self.splits - 1, self.warpgroups, *self.finished)
      transforms = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
      scratch["others"] = plgpu.SMEM(others, jnp.float32, transforms=transforms)
      # JAX 0.11 adds the number of a barrier twice when it signals another
      # thread block, which then waits forever. So all warpgroups have one.
      scratch["arrived"] = plgpu.Barrier(
        num_arrivals=(self.splits - 1) * self.warpgroups
      )
    return scratch

  def _exchange(self, s, me, split, value_of) -> jax.Array:
    """Adds up what the blocks of a cluster found of a warpgroup's part.

    Args:
      s: Shared memory by name.
      me: The warpgroup.
      split: Which of the blocks this is.
      value_of: Gives what this block found, of some rows.
    """
    if not self.exchange:
      return value_of(self.own_rows(me, split))
    for k in range(1, self.splits):
      other = lax.rem(split + k, jnp.int32(self.splits))
      plgpu.async_store_smem(
        value_of(self.own_rows(me, other)),
        s["others"].at[k - 1, me],
        s["arrived"],
        cluster_idx=other, cluster_dim="split", optimized=False,
      )  # fmt: skip
    value = value_of(self.own_rows(me, split))
    plgpu.barrier_wait(s["arrived"])
    for k in range(self.splits - 1):
      value += load(s["others"].at[k, me], ROWS)
    return value

  def run(
    self,
    x_ref: Any,
    refs: Sequence[Any],
    column: jax.Array,
    s: dict[str, Any],
    *,
    prefix: tuple[jax.Array, ...] = (),
    split: int | jax.Array = 0,
    prepare: Callable[[jax.Array], tuple[Any, Any]],
    finish: Callable[[jax.Array, Any], None],
  ) -> None:
    """Multiplies; each warpgroup takes a part of the result.

    Args:
      x_ref: (N, D) bfloat16.
      refs: What `operands` gave.
      column: The first of the thread block.
      s: The kernel's shared memory by name, with that of `scratch`.
      prefix: Index of the axes in front of (F, D).
      split: Which of the thread blocks that share D this is.
      prepare: Called with the warpgroup's index when the weights are on their
        way. Returns what `finish` takes, and what is not looked at.
      finish: Called with the warpgroup's part of the product, `finished`,
        float32 in the layout ROWS, and what `prepare` returned.
    """
    me = lax.axis_index("warpgroup")
    layer = lambda ref: ref.at[prefix] if prefix else ref
    x_s, sums_s = (s["x"], s["sums"]) if self.interpret else s["x"]
    # What TMA writes, and how it is read.
    aliased = self.packed and not self.interpret
    bytes_s, codes_s = s["w"] if aliased else (s["w"], s["w"])
    width, stages = bytes_s.shape[-1], self.depth_of_ring
    tile = pl.ds(me * TILE, TILE)
    first = split * self.share
    steps = jnp.minimum(first + self.share, self.chunks) - first
    first_scale = split * self.groups_of_split // self.line * self.line
    slot_of = lambda i: lax.rem(i, jnp.int32(stages))
    together = pl.ds(column, self.columns)

    def fetch_weights(i, slot):
      own = together, pl.ds((first + i) * width, width)
      plgpu.copy_gmem_to_smem(
        layer(refs[0]).at[own], bytes_s.at[slot], s["loaded"].at[slot]
      )

    def fetch_rows(i, slot):
      own = x_ref.at[:, pl.ds((first + i) * self.chunk, self.chunk)]
      plgpu.copy_gmem_to_smem(own, x_s.at[slot], s["loaded"].at[slot])

    @pl.when(me == 0)
    def _():
      if self.scales:
        own = together, pl.ds(first_scale, self.scales)
        plgpu.copy_gmem_to_smem(
          layer(refs[1]).at[own], s["scales"], s["scales_loaded"]
        )
      for fetch in (fetch_weights, fetch_rows):
        for i in range(stages):
          pl.when(i < steps)(lambda i=i, f=fetch: f(jnp.int32(i), i))

    of_columns = None
    if not self.scales:
      own = layer(refs[-1]).at[pl.ds(column + me * TILE, TILE)]
      of_columns = load(own, ROWS.reduce(0))
    prepared, _ = prepare(me)
    if self.scales:
      plgpu.barrier_wait(s["scales_loaded"])

    def refill(i):
      """Asks for another chunk in the place of one that all have read."""

      @pl.when((me == 0) & (i >= 0) & (i + stages < steps))
      def _():
        slot = slot_of(jnp.maximum(i, 0))
        plgpu.barrier_wait(s["consumed"].at[slot])
        fetch_weights(i + stages, slot)
        fetch_rows(i + stages, slot)

    def multiply(slot, meanwhile):
      """The product of a chunk, in parts: one converts as one multiplies."""
      codes = few_bits.loaded(codes_s.at[slot, tile], packed=self.packed)
      size = self.chunk // _PARTS

      def part(k):
        own = codes[:, k * size : (k + 1) * size].astype(jnp.bfloat16)
        return own, x_s.at[slot, :, pl.ds(k * size, size)]

      if self.interpret:
        meanwhile()
        products = [
          jnp.dot(left, x[...].T, preferred_element_type=jnp.float32)
          for left, x in map(part, range(_PARTS))
        ]
        return sum(products[1:], products[0])

      def body(sums):
        for k in range(_PARTS):
          left, x = part(k)
          plgpu.wgmma(sums, left, x.T)
        meanwhile()
        plgpu.wgmma_wait(0)
        return sums[...]

      return pl.run_scoped(body, plgpu.ACC((TILE, self.rows), jnp.float32))

    def step(i, total):
      slot = slot_of(i)
      plgpu.barrier_wait(s["loaded"].at[slot])
      again = stages < self.share
      found = multiply(slot, lambda: refill(i - 1) if again else None)
      if again:
        # Only what is asked for again is waited for.
        pl.when(i + stages < steps)(
          lambda: plgpu.barrier_arrive(s["consumed"].at[slot])
        )
      if self.scales:
        scale = lax.div(first + i, jnp.int32(self.chunks // self.groups))
        own = s["scales"].at[tile, scale - first_scale]
        found *= few_bits.spread(own, 0, self.rows)
      return total + found

    zero = jnp.zeros((TILE, self.rows), jnp.float32)
    zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    total = lax.fori_loop(jnp.int32(0), steps, step, zero)
    if not self.interpret:
      # Sums lie where chunks did, which all have to have read.
      plgpu.barrier_arrive(s["read"])
      plgpu.barrier_wait(s["read"])
    sums_s = sums_s.at[me, :, pl.ds(0, TILE)]
    store(sums_s.T, plgpu.layout_cast(total, SUMS))

    def value_of(rows):
      value = load(sums_s.at[rows], ROWS)
      if of_columns is not None:
        value *= repeat(of_columns, 1, value.shape, ROWS)
      return value

    finish(self._exchange(s, me, split, value_of), prepared)
