"""The skinny product of the Mosaic GPU kernels: few rows, a stack of weights.

Hopper's matrix unit (wgmma) multiplies tiles of 64 rows, of which a batch of
one would waste 63. So the product is transposed: 64 columns of the weights are
the rows of a tile, and the N rows of the batch its columns, of which any eight
do. The weights come by TMA straight out of their stack, many chunks ahead; what
they are multiplied with comes along, out of the L2 cache.

The sums pass through shared memory, from where each warp takes whole rows, so
that global memory is read and written in whole lines.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops.hopper_tiles import ROWS, SUMS, TILE, load, repeat, store

# Rows of a chunk of weights.
CHUNK = 64
# Columns of what is prefetched at a time.
BOX = 256
# Arrays of partial sums, (N, .), are padded to a multiple of this.
PARTIALS = 128


def sum_of_rows(partials_ref, first, last, layout=ROWS) -> jax.Array:
  """Adds up columns [first, last) of (N, .); others may hold anything."""
  values = load(partials_ref, layout)
  ids = plgpu.broadcasted_iota(jnp.int32, values.shape, 1, layout=layout)
  inside = (ids >= first) & (ids < last)
  return jnp.sum(jnp.where(inside, values, 0.0), axis=1)


@dataclasses.dataclass(frozen=True)
class Product:
  """x (N, K) @ W[layer] (K, .), of which a thread block gives some columns.

  Attributes:
    rows: N, a multiple of 8.
    depth: K, a multiple of CHUNK.
    columns: Columns of a block, TILE or twice that.
    stages: Chunks of weights in shared memory; all but one are being fetched.
    splits: Thread blocks that share K.
    parts: Of K, each with a factor of its own for every row.
    overlap: Whether the kernel may start before the one in front of it ends.
    interpret: Whether the kernel is interpreted. The interpreter knows shared
      memory as matrices, not as the tiles that these consist of.
  """

  rows: int
  depth: int
  columns: int
  stages: int
  splits: int = 1
  parts: int = 1
  overlap: bool = False
  interpret: bool = False

  def __post_init__(self):
    """Checks what would else wait forever, or leave out some of K."""
    if self.stages < 2 or self.depth % (self.splits * CHUNK):
      raise ValueError(
        f"mamba2_step: {self.stages} stages and {self.splits} splits do not fit"
        f" the {self.depth} rows of the weights"
      )

  @property
  def workers(self) -> int:
    """Warpgroups that finish a part of the result: the one that there is."""
    return 1

  @property
  def finished(self) -> tuple[int, int]:
    """Rows and columns of this part."""
    return self.rows, self.columns

  @property
  def exchange(self) -> bool:
    """Whether the blocks that share K each finish a share of the rows."""
    return False

  def own_rows(self, me, split=0):
    """Rows that a warpgroup finishes: all."""
    del me, split
    return pl.ds(0, self.rows)

  def operands(self, w: jax.Array) -> list[jax.Array]:
    """Weights (..., K, F) as `run` takes them, (..., K / 8, 8, F)."""
    *layers, depth, width = w.shape
    return [w.reshape(*layers, depth // 8, 8, width)]

  def launch(self) -> dict:
    """What `plgpu.kernel` is to be told."""
    return {}

  def scratch(self) -> dict:
    """Shared memory and barriers for `results`."""
    transforms = plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128)
    tile = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)
    tiles = self.columns // TILE
    copies = CHUNK // 8 if self.interpret else 1
    return {
      "w": tile(self.stages, tiles, CHUNK, TILE),
      "x": tile(self.stages, self.rows, CHUNK),
      # Four more than needed let the threads of a warp store to all banks.
      "sums": plgpu.SMEM((self.rows, self.columns + 4), jnp.float32),
      "loaded": plgpu.Barrier(
        num_arrivals=tiles * copies + 1, num_barriers=self.stages
      ),
    }

  def run(
    self, x_ref, refs, column, s, *, prefix, split=0, prepare, finish, pick=None
  ) -> None:  # fmt: skip
    """Multiplies, as the `run` of weights of few bits does.

    Args:
      x_ref: (N, K) bfloat16.
      refs: What `operands` gave.
      column: The first of the block.
      s: The kernel's shared memory by name, with that of `scratch`.
      prefix: The layer of the weights.
      split: Which of the thread blocks that share K this is.
      prepare: Called with the index of the warpgroup, 0, when the weights are
        on their way and what other kernels wrote can be read. Returns what
        `finish` takes, and for several parts the factor of each, (N,).
      finish: Called with the product (N, columns) float32 in the layout ROWS,
        and what `prepare` returned.
      pick: Where there are weights of several matrices, called with the number
        of a tile of columns and a function, which it calls, of operands and the
        first column there. Else those of `refs` from `column` are taken.
    """
    total, rest = None, None
    if pick is None:
      pick = lambda j, copy: copy(refs, column + j * TILE)
    results = self._results(
      pick, x_ref, prefix[0], s, split=split, prepare=lambda: prepare(0)
    )
    for k, (value, rest) in enumerate(results):
      if self.parts > 1:
        value *= repeat(rest[1][k], 0, value.shape, ROWS)
      total = value if total is None else total + value
    finish(total, rest[0])

  def _results(
    self, pick, x_ref, layer, s, *, split, prepare
  ) -> Iterator[tuple[jax.Array, object]]:  # fmt: skip
    """Yields the product over each part of K, and what `prepare` returned."""
    steps = self.depth // CHUNK // self.splits
    tiles, stages = self.columns // TILE, min(self.stages, steps)

    def fetch_weights(i, slot):
      first = (split * steps + i) * (CHUNK // 8)
      for j in range(tiles):
        pick(j, functools.partial(fetch_tile, first, slot, j))

    def fetch_tile(first, slot, j, refs, column):
      w_ref = refs[0]
      columns = pl.ds(column, TILE)
      if self.interpret:
        copies = [
          (w_ref.at[layer, first + k, :, columns], pl.ds(8 * k, 8))
          for k in range(CHUNK // 8)
        ]
        copies = [(a, s["w"].at[slot, j, rows]) for a, rows in copies]
      else:
        # The same place as the (8, TILE) tiles that it consists of. The
        # transform from tiles to a matrix would ask that the width of the
        # weights be a multiple of TILE; so TMA fills up with zeros.
        swizzled = s["w"].transforms[:1]
        target = dataclasses.replace(s["w"], transforms=swizzled)
        rows = pl.ds(first, CHUNK // 8)
        copies = [(w_ref.at[layer, rows, :, columns], target.at[slot, j, :, 0])]
      for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, s["loaded"].at[slot])

    def fetch_rows(i, slot):
      source = x_ref.at[:, pl.ds((split * steps + i) * CHUNK, CHUNK)]
      plgpu.copy_gmem_to_smem(source, s["x"].at[slot], s["loaded"].at[slot])

    def step(i, accumulators):
      slot = lax.rem(i, jnp.int32(stages))
      plgpu.barrier_wait(s["loaded"].at[slot])
      for j, accumulator in enumerate(accumulators):
        plgpu.wgmma(accumulator, s["w"].at[slot, j].T, s["x"].at[slot].T)
      # All but these have been read.
      plgpu.wgmma_wait(tiles)

      @pl.when((i > 0) & (i - 1 + stages < steps))
      def _():
        old = lax.rem(i - 1, jnp.int32(stages))
        fetch_weights(i - 1 + stages, old)
        fetch_rows(i - 1 + stages, old)

    def part(first, last, *accumulators):
      @pl.loop(first, last)
      def _(i):
        step(i, accumulators)

      return [accumulator[...] for accumulator in accumulators]

    for i in range(stages):
      fetch_weights(i, i)
    if self.overlap and not self.interpret:
      plgpu.griddepcontrol_launch_dependents()
      plgpu.griddepcontrol_wait()
    for i in range(stages):
      fetch_rows(i, i)
    prepared = prepare()
    for k in range(self.parts):
      sums = pl.run_scoped(
        functools.partial(
          part,
          jnp.int32(k * steps // self.parts),
          jnp.int32((k + 1) * steps // self.parts),
        ),
        *[plgpu.ACC((TILE, self.rows), jnp.float32)] * tiles,
      )
      for j, value in enumerate(sums):
        columns = s["sums"].at[:, pl.ds(j * TILE, TILE)]
        store(columns.T, plgpu.layout_cast(value, SUMS))
      columns = s["sums"].at[:, pl.ds(0, self.columns)]
      yield load(columns, ROWS), prepared


def prefetch(
  w_ref, layer, rows: int, worker, workers: int, *, first: int = 0,
  splits: int = 1,
) -> None:  # fmt: skip
  """Brings rows of a layer's weights to the L2 cache, the first by default.

  Memory would else rest while one kernel ends and the next one begins. Each of
  the blocks, `worker` of `workers`, asks for some boxes of CHUNK rows, and does
  not wait for them. Not for kernels that are interpreted.

  Args:
    w_ref: (L, K / 8, 8, F).
    layer: int32 scalar.
    rows: Of each share of K.
    worker: int32 scalar.
    workers: Their number.
    first: The first row of each share that is asked for.
    splits: Shares of K.
  """
  _, eights, _, width = w_ref.shape
  across = -(-width // BOX)
  boxes = splits * (rows // CHUNK) * across

  @pl.loop(0, -(-boxes // workers))
  def _(i):
    box = worker + i * workers

    @pl.when(box < boxes)
    def _():
      chunk = lax.div(box, jnp.int32(across))
      row = lax.div(chunk, jnp.int32(splits)) * (CHUNK // 8) + first // 8
      row += lax.rem(chunk, jnp.int32(splits)) * (eights // splits)
      columns = pl.ds(lax.rem(box, jnp.int32(across)) * BOX, BOX)
      plgpu.async_prefetch(w_ref.at[layer, pl.ds(row, CHUNK // 8), :, columns])
