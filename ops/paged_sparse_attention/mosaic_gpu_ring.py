"""Tiles of keys, values or summaries on their way to shared memory.

A tile is 64 rows of a head, of as many pages as these take, each of which is a
copy of its own. In Pallas all 128 threads of a warpgroup arrive at a barrier
for every copy. Here one thread does so, once for all copies of a tile.
"""

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from ops import hopper_tiles
from ops.hopper_tiles import TILE

_SCALAR = plgpu.Layout.WG_SPLAT
_TRANSFORMS = plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128)


def scratch(*, parts: int, stages: int, copies: int, interpret) -> dict:
  """Shared memory of a `Ring`, by name.

  Args:
    parts: Of 64 of a head's numbers.
    stages: Tiles that are there at a time.
    copies: Copies that make a part of a tile.
    interpret: What the kernel is interpreted with, or False.
  """
  return {
    "tiles": hopper_tiles.swizzled(
      (stages, parts, TILE, TILE), jnp.bfloat16, 16
    ),
    # The interpreter has barriers of Pallas alone, where each copy arrives.
    "arrived": plgpu.Barrier(num_arrivals=parts * copies, num_barriers=stages)
    if interpret
    else plgpu.SMEM((2 * stages,), jnp.int32),
  }


class Ring:
  """Places of tiles, which are filled and waited for in order.

  Attributes:
    tiles: Reference, (stages, parts, 64, 64).
    stages: Places.
  """

  def __init__(self, s: dict, interpret):
    """Takes what `scratch` names; all threads of the block take part."""
    self.tiles, self._arrived, self._interpret = (
      s["tiles"], s["arrived"], interpret
    )  # fmt: skip
    self.stages, self._parts = self.tiles.shape[:2]
    if not interpret:
      self._start()

  def _start(self):
    stages = self.stages

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def start(_, arrived):
      own = mgpu.utils.memref_slice(arrived, mgpu.ds(0, stages))
      mgpu.utils.BarrierRef.initialize(own, arrival_count=1)
      _assembly("fence.mbarrier_init.release.cluster;")
      mgpu.utils.warpgroup_barrier()

    start(self._arrived)

  def fetch(self, n, ref, at, begins, rows: int) -> None:
    """Begins to copy tile n, when all threads have come here.

    So the tile that is in its place may have been read just before.

    Args:
      n: int32 scalar, which counts from 0.
      ref: (L, B, S, N, K).
      at: Layer, row and head, int32 scalars.
      begins: First slot of each copy.
      rows: Slots of a copy.
    """
    slot, (layer, row, head) = lax.rem(n, jnp.int32(self.stages)), at
    if self._interpret:
      for i, begin in enumerate(begins):
        for part in range(self._parts):
          plgpu.copy_gmem_to_smem(
            ref.at[
              layer, row, pl.ds(begin, rows), head, pl.ds(part * TILE, TILE)
            ],
            self.tiles.at[slot, part, pl.ds(i * rows, rows)],
            self._arrived.at[slot],
          )
      return
    parts, count = self._parts, 4 + len(begins)
    size = len(begins) * rows * parts * TILE * 2

    @plgpu.inline_mgpu(
      arg_types=(
        plgpu.RefType(), plgpu.RefType(_TRANSFORMS), plgpu.RefType(),
        *[_SCALAR] * count,
      )
    )  # fmt: skip
    def copy(context, ref, tiles, arrived, *numbers):
      slot, layer, row, head, *begins = (x.registers.item() for x in numbers)
      mgpu.utils.warpgroup_barrier()
      one = mgpu.utils.single_thread_predicate(
        mgpu.utils.ThreadSubset.WARPGROUP
      )
      barrier = _barrier(arrived, slot)
      barrier.arrive_expect_tx(size, predicate=one)
      for i, begin in enumerate(begins):
        for part in range(parts):
          own = mgpu.ds(i * (rows // 8), rows // 8)
          context.async_copy(
            src_ref=ref,
            dst_ref=mgpu.utils.memref_slice(
              tiles, (_index(slot), part, own)
            ),
            gmem_slice=(
              _index(layer), _index(row), mgpu.ds(_index(begin), rows),
              _index(head), mgpu.ds(part * TILE, TILE),
            ),
            gmem_transform=(mgpu.TileTransform((8, TILE)),),
            swizzle=128,
            barrier=barrier,
            arrive=False,
            predicate=one,
          )  # fmt: skip

    copy(ref, self.tiles, self._arrived, slot, layer, row, head, *begins)

  def wait(self, n):
    """Waits for tile n, and returns its place."""
    slot = lax.rem(n, jnp.int32(self.stages))
    if self._interpret:
      plgpu.barrier_wait(self._arrived.at[slot])
      return slot
    parity = lax.rem(lax.div(n, jnp.int32(self.stages)), jnp.int32(2))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))
    def wait(_, arrived, slot, parity):
      bit = arith.trunci(
        ir.IntegerType.get_signless(1), parity.registers.item()
      )
      _barrier(arrived, slot.registers.item()).wait_parity(bit)

    wait(self._arrived, slot, parity)
    return slot


def meet(barrier, meanwhile, interpret) -> None:
  """Waits for all blocks of a cluster, and sees what they have stored.

  Args:
    barrier: Of the cluster.
    meanwhile: Called before the block waits; what it stores is not seen.
    interpret: What the kernel is interpreted with, or False.
  """
  # A barrier of a cluster orders nothing that is stored outside of a block.
  _fence(interpret)
  plgpu.barrier_arrive(barrier)
  meanwhile()
  plgpu.barrier_wait(barrier)
  _fence(interpret)


def _fence(interpret):
  if interpret:
    return

  @plgpu.inline_mgpu()
  def fence(_):
    _assembly("fence.acq_rel.cluster;")

  fence()


def _assembly(text: str) -> None:
  mgpu.utils.inline_ptx(text, has_side_effects=True)


def _index(value):
  return arith.index_cast(ir.IndexType.get(), value)


def _barrier(arrived, slot):
  """The barrier of a place, of those that lie side by side in memory."""
  return mgpu.utils.BarrierRef(mgpu.utils.memref_ptr(arrived), slot, None, 1)
