"""Tiles of weights, keys and values on their way, through a whole step.

What a thread block reads of memory in a step is known beforehand, and depends
on nothing: tiles of the weights, and the keys and values of tokens before. So
each of its warpgroups asks for its tiles of 64 x 64 in the order in which it
takes them, as many ahead as shared memory holds, and for another one when it is
through with one. Memory does not rest while the blocks wait for each other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_tiles import TILE

WGMMA = plgpu.Layout.WGMMA
# Rows that the matrix unit sees, of which the first is the token's.
ROWS_OF_UNIT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A product of a layer, cut into units, of which a block has one or none.

  Attributes:
    depth: K.
    width: F.
    per: Tiles of columns of a unit; it divides their number.
    splits: Units that share the rows of their tiles.
    matrices: Of which a unit has the same columns.
    backwards: Whether the last block takes the first unit.
    runs: Whether this kernel does it at all.
  """

  depth: int
  width: int
  per: int
  splits: int
  matrices: int = 1
  backwards: bool = False
  runs: bool = True

  @property
  def groups(self) -> int:
    """Of tiles."""
    return self.width // TILE // self.per

  @property
  def units(self) -> int:
    """Of all blocks."""
    return self.groups * self.splits

  @property
  def chunks(self) -> int:
    """Tiles of rows of a unit."""
    return self.depth // TILE // self.splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
  """Attention of a layer, whose units share the slots of a key/value head.

  Attributes:
    heads: N.
    splits: Units of a head.
    parts: Of 64 of a head's numbers.
    runs: Whether this kernel does it at all.
  """

  heads: int
  splits: int
  parts: int
  runs: bool = True
  backwards: bool = True

  @property
  def units(self) -> int:
    """Of all blocks."""
    return self.heads * self.splits


def _split(at, size: int):
  """Quotient and remainder."""
  return lax.div(at, jnp.int32(size)), lax.rem(at, jnp.int32(size))


class Stream:
  """The tiles of a warpgroup, in the order in which it takes them.

  Attributes:
    me: The index of the warpgroup.
    has: By phase, whether this block has a unit of it.
    group: By product, that of the block's unit; by attention, the head.
    split: By phase, that of the block's unit.
    tiles: Of 64 slots that this warpgroup attends to.
    begin_tile: The first of these.
  """

  def __init__(self, parts, refs, span, length, block, blocks, s):
    """Counts the tiles of this warpgroup; `begin` asks for the first.

    Args:
      parts: By phase, in their order, a `Part` or `Attention`.
      refs: By phase what is read: a matrix (L, K, F) for each range of tiles of
        columns with their number; keys and values (L, 1, S, N, K).
      span: The first layer, and the one behind the last.
      length: int32 scalar, slots that are filled.
      block: The index of the thread block.
      blocks: Their number.
      s: Shared memory by name, with that of `scratch`.
    """
    self._parts, self._refs, self._s = parts, refs, s
    self.me = lax.axis_index("warpgroup")
    self._warpgroups, self._stages = s["w"].shape[:2]
    self._first = span[0]
    self.has, self.group, self.split = {}, {}, {}
    self._own, self._sizes, self._offsets = {}, {}, {}
    offset = jnp.int32(0)
    for name, part in parts.items():
      place = blocks - 1 - block if part.backwards else block
      has = place < part.units
      self.has[name] = has
      if isinstance(part, Attention):
        self.group[name] = lax.div(place, jnp.int32(part.splits))
        self.split[name] = lax.rem(place, jnp.int32(part.splits))
        filled = lax.div(length + TILE - 1, jnp.int32(TILE))
        sub = self.split[name] * self._warpgroups + self.me
        shares = jnp.int32(part.splits * self._warpgroups)
        self.begin_tile = lax.div(sub * filled, shares)
        self.tiles = lax.div((sub + 1) * filled, shares) - self.begin_tile
        size = 2 * part.parts * self.tiles
      else:
        # Units of a share of the rows are neighbours.
        self.group[name] = lax.rem(place, jnp.int32(part.groups))
        self.split[name] = lax.div(place, jnp.int32(part.groups))
        own = part.chunks - self.me + self._warpgroups - 1
        self._own[name] = lax.div(own, jnp.int32(self._warpgroups))
        size = part.per * part.matrices * self._own[name]
      size = jnp.where(has & part.runs, size, 0)
      self._sizes[name], self._offsets[name] = size, offset
      offset += size
    self._each = offset
    self._total = offset * (span[1] - span[0])

  @staticmethod
  def scratch(warpgroups: int, stages: int) -> dict[str, Any]:
    """Shared memory and barriers."""
    return {
      "w": hopper_tiles.swizzled(
        (warpgroups, stages, TILE, TILE), jnp.bfloat16, 16
      ),
      "loaded": plgpu.Barrier(num_barriers=warpgroups * stages),
    }

  def begin(self) -> None:
    """Asks for the first tiles."""

    @pl.loop(0, self._stages)
    def _(slot):
      self._fetch(slot, slot)

  def _fetch(self, n, slot) -> None:
    """Asks for the nth tile of all, if there is one."""
    each = jnp.maximum(self._each, 1)
    layer = self._first + lax.div(n, each)
    at = lax.rem(n, each)
    for name, part in self._parts.items():
      if not part.runs:
        continue
      here = at - self._offsets[name]
      mine = (n < self._total) & (here >= 0) & (here < self._sizes[name])
      copy = (
        self._copy_cache if isinstance(part, Attention) else self._copy_weights
      )
      pl.when(mine)(
        lambda copy=copy, name=name, here=here: copy(name, layer, here, slot)
      )

  def _copy(self, source, slot) -> None:
    loaded = self._s["loaded"].at[self.me * self._stages + slot]
    plgpu.copy_gmem_to_smem(source, self._s["w"].at[self.me, slot], loaded)

  def _copy_weights(self, name, layer, at, slot) -> None:
    part, own = self._parts[name], jnp.maximum(self._own[name], 1)
    at, j = _split(at, part.matrices)
    k, i = lax.div(at, own), lax.rem(at, own)
    for which in range(part.matrices):
      copy = functools.partial(
        self._copy_weight, name, layer, k, i, which, slot
      )
      pl.when(j == which)(copy)

  def _copy_weight(self, name, layer, k, i, which, slot) -> None:
    """The ith tile of rows of the kth of columns, of one of the matrices."""
    part = self._parts[name]
    chunk = self.split[name] * part.chunks + self.me + i * self._warpgroups
    tile = self.group[name] * part.per + k
    rows = pl.ds(chunk * TILE, TILE)

    def copy(ref, first):
      columns = pl.ds((tile - first) * TILE, TILE)
      self._copy(ref.at[layer, rows, columns], slot)

    refs = self._refs[name]
    if part.matrices > 1 or len(refs) == 1:
      copy(refs[which][0], 0)
      return
    for ref, first, count in refs:
      here = (tile >= first) & (tile < first + count)
      pl.when(here)(functools.partial(copy, ref, first))

  def _copy_cache(self, name, layer, at, slot) -> None:
    i, at = _split(at, 2 * self._parts[name].parts)
    for which in range(2 * self._parts[name].parts):
      copy = functools.partial(self._copy_slots, name, layer, i, which, slot)
      pl.when(at == which)(copy)

  def _copy_slots(self, name, layer, i, which, slot) -> None:
    """Of the ith tile of slots a part of the keys, or behind them of values."""
    k, p = divmod(which, self._parts[name].parts)
    slots = pl.ds((self.begin_tile + i) * TILE, TILE)
    channels, head = pl.ds(p * TILE, TILE), self.group[name]
    source = self._refs[name][k].at[layer, 0, slots, head, channels]
    self._copy(source, slot)

  def base(self, name: str, layer) -> jax.Array:
    """The number of this warpgroup's first tile of a phase of a layer."""
    return (layer - self._first) * self._each + self._offsets[name]

  def arrived(self, n) -> Any:
    """Waits for the nth tile, and returns it."""
    slot = lax.rem(n, jnp.int32(self._stages))
    plgpu.barrier_wait(self._s["loaded"].at[self.me * self._stages + slot])
    return self._s["w"].at[self.me, slot]

  def _ahead(self, i, j: int, each: int) -> tuple[jax.Array, int]:
    """The tile that takes the place of the one before the jth of the ith."""
    more, j = divmod(j + self._stages - 1, each)
    return i + more, j

  def refill_slots(self, i, which: int, layer) -> None:
    """Asks for more slots, when those before part `which` of tile i are free.

    For this warpgroup's tiles of this phase alone, as `multiply` does; what
    comes behind them is asked for by `rest`.
    """
    each = 2 * self._parts["attend"].parts
    n = self.base("attend", layer) + i * each + which
    i, which = self._ahead(i, which, each)

    @pl.when((i < self.tiles) & (n > 0))
    def _():
      slot = lax.rem(n - 1, jnp.int32(self._stages))
      self._copy_slots("attend", layer, i, which, slot)

  def rest(self, name: str, layer, k=0) -> None:
    """Asks for what comes behind tiles that have been taken.

    This takes a while, and is best done when others need nothing of this block.

    Args:
      name: Of the phase.
      layer: In which it is.
      k: As in `multiply`.
    """
    part, base = self._parts[name], self.base(name, layer)
    if isinstance(part, Attention):
      count = self.tiles * 2 * part.parts
    else:
      count = self._own[name] * part.matrices
      base += k * count

    @pl.loop(jnp.maximum(count - self._stages + 1, 0), count)
    def _(u):
      n = base + u

      @pl.when(n > 0)
      def _():
        slot = lax.rem(n - 1, jnp.int32(self._stages))
        self._fetch(n - 1 + self._stages, slot)

  def multiply(self, name: str, layer, k, x_ref) -> list[jax.Array]:
    """This warpgroup's share of tiles of columns, the kth of the block's unit.

    `rest` is to be called behind it.

    Args:
      name: Of the product.
      layer: In which it is.
      k: Of the unit's `per` tiles.
      x_ref: (chunks, 8, 64) bfloat16, of which the first rows count.

    Returns:
      A vector (64,) float32 for each matrix, in the layout of wgmma's columns.
    """
    part, own = self._parts[name], self._own[name]
    base = self.base(name, layer) + k * own * part.matrices

    def run(*sums):
      @pl.loop(0, own)
      def _(i):
        x = x_ref.at[self.me + i * self._warpgroups]
        for j, one in enumerate(sums):
          n = base + i * part.matrices + j
          plgpu.wgmma(one, self.arrived(n).T, x.T)
          plgpu.wgmma_wait(1)
          # The one before has been read.
          next_i, which = self._ahead(i, j, part.matrices)

          @pl.when((next_i < own) & (n > 0))
          def _(n=n, next_i=next_i, which=which):
            slot = lax.rem(n - 1, jnp.int32(self._stages))
            self._copy_weight(name, layer, k, next_i, which, slot)

      return [one[...] for one in sums]

    shape = TILE, ROWS_OF_UNIT
    found = pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * part.matrices)
    rows = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    # Other rows hold anything, be it no number.
    return [jnp.sum(jnp.where(rows == 0, one, 0.0), axis=1) for one in found]
