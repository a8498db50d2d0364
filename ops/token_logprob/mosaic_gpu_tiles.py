"""What the Mosaic GPU kernels of `token_logprob` share: a walk over logits.

A thread block walks over the columns of the logits of 128 tokens. Two
warpgroups, one Pallas thread each, compute tiles of logits in their registers,
as sums over slices of 64 of the E channels; a third one loads, a ring of slices
ahead. What a warpgroup does with a tile is hidden behind the products of the
other. There are two ways to share the work:

- Where the 128 hidden states fit into shared memory beside the ring, they stay
  there, and only weights are loaded. The warpgroups take turns with tiles of
  all 128 tokens and 128 columns. The ring holds no more slices than a tile has,
  so they cannot fall into step.
- Else the hidden states are loaded again for every tile, from the L2 cache, and
  tiles of 256 columns halve how often. Each warpgroup has 64 of the tokens. Now
  one may be as far ahead as the ring is long, and E is large, so that the
  products take most of the time.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

WORKERS = 2
# Tokens of a thread block.
TOKENS = 128
# What the number of columns must be a multiple of.
COLUMNS = 256
# Channels of a slice: 128 bytes, as wide as a swizzled tile can be.
DEPTH = 64

TILE = plgpu.Layout.WGMMA
# The layout of a vector with one element a row of a tile.
ROW = TILE.reduce(1)

# Registers a thread of the warpgroups that compute, and of that which loads.
_REGISTERS = (232, 40)
# Bytes of shared memory that a block may have, less what barriers need.
_SHARED_MEMORY = 226 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
  """How a kernel goes over the logits.

  Attributes:
    resident: Whether the hidden states of a block stay in shared memory.
    splits: Thread blocks that share the columns of the same tokens.
    stages: Slices that the ring holds.
  """

  resident: bool
  splits: int = 1
  stages: int = 4

  @property
  def shape(self) -> tuple[int, int]:
    """Tokens and columns of a warpgroup's tile."""
    return (128, 128) if self.resident else (64, 256)

  @property
  def parts(self) -> int:
    """Warpgroups that share the columns of the same tokens."""
    return self.splits * (WORKERS if self.resident else 1)


def stages(width: int, resident: bool, scratch_bytes: int) -> int:
  """Returns how many slices the ring can hold, at most those of a tile."""
  columns = Walk(resident=resident).shape[1]
  hidden = 2 * TOKENS * (width if resident else 0)
  stage = 2 * DEPTH * (columns + (0 if resident else TOKENS))
  free = _SHARED_MEMORY - scratch_bytes - hidden
  return min(free // stage, max(width // DEPTH, 2))


def tile(*shape: int) -> plgpu.SMEM:
  """Shared memory for bfloat16 tiles, swizzled as wgmma and TMA want them."""
  transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def along_rows(vector: jax.Array, like: jax.Array) -> jax.Array:
  """A tile with the vector down each column."""
  return lax.broadcast_in_dim(vector, like.shape, [0])


def column_ids(first, like: jax.Array) -> jax.Array:
  """The column of each element of a tile that begins at column `first`."""
  ids = plgpu.broadcasted_iota(jnp.int32, like.shape, 1, layout=TILE)
  return first + ids


def walk(
  work: Callable,
  hidden_TE: jax.Array,
  weight_VE: jax.Array,
  *operands: jax.Array,
  columns: int,
  config: Walk,
  out_type: jax.ShapeDtypeStruct,
  scratch: dict,
  name: str,
  interpret,
) -> jax.Array:
  """Runs a kernel over all tiles of hidden_TE @ weight_VE^T.

  Args:
    work: `work(rows, part, operands, out, scratch)`, run by each warpgroup that
      computes for its rows of hidden_TE and one of `config.parts` of their
      columns. Returns what it starts with, `step(first, logits, carry, last)`
      for a tile in float32 that begins at column `first`, in which columns from
      `columns` on are only if `last`, and `finish(carry)`.
    hidden_TE: (T, E) bfloat16, T a multiple of TOKENS and E of DEPTH.
    weight_VE: (V, E) bfloat16, V a multiple of COLUMNS.
    *operands: More operands of the kernel, left in global memory.
    columns: Rows of weight_VE to visit, in tiles that hold at least one.
    config: How to go.
    out_type: Of the result.
    scratch: Shared memory for each warpgroup's `work`.
    name: Of the kernel.
    interpret: False, or the parameters of the interpreter.
  """
  tokens, width = hidden_TE.shape
  height, span = config.shape
  slices, tiles = width // DEPTH, pl.cdiv(columns, span)
  share, whole = pl.cdiv(tiles, config.splits), columns // span
  slot_of = lambda n: lax.rem(n, jnp.int32(config.stages))

  def arrival_of(i, k):
    """The barrier for slice k of tile i.

    A warpgroup must see every phase of a barrier that it waits for. Where
    warpgroups take turns each has a ring of barriers for its slices, though
    they share the memory.
    """
    if not config.resident:
      return slot_of(i * slices + k)
    turn, owner = lax.div(i, jnp.int32(WORKERS)), lax.rem(i, jnp.int32(WORKERS))
    return owner * config.stages + slot_of(turn * slices + k)

  def kernel(hidden_ref, weight_ref, *refs, hidden, weight, loaded, consumed,
             resident=None, **scratch):  # fmt: skip
    *operand_refs, out_ref = refs
    worker = lax.axis_index("worker")
    split = lax.axis_index("split")
    first_row = lax.axis_index("rows") * TOKENS
    first = split * share
    steps = jnp.minimum(share, tiles - first)

    def load_hidden(k, target, barrier):
      rows, channels = pl.ds(first_row, TOKENS), pl.ds(k * DEPTH, DEPTH)
      plgpu.copy_gmem_to_smem(hidden_ref.at[rows, channels], target, barrier)

    def load():
      if config.resident:
        for k in range(slices):
          load_hidden(k, hidden.at[k], resident)

      @pl.loop(0, steps * slices)
      def _(n):
        slot = slot_of(n)

        @pl.when(n >= config.stages)
        def _():
          plgpu.barrier_wait(consumed.at[slot])

        i, k = lax.div(n, jnp.int32(slices)), lax.rem(n, jnp.int32(slices))
        rows, channels = (
          pl.ds((first + i) * span, span),
          pl.ds(k * DEPTH, DEPTH),
        )
        arrival = loaded.at[arrival_of(i, k)]
        plgpu.copy_gmem_to_smem(
          weight_ref.at[rows, channels], weight.at[slot], arrival
        )
        if not config.resident:
          load_hidden(k, hidden.at[slot], arrival)

      # Every phase of a barrier must be seen before the kernel ends.
      @pl.loop(jnp.maximum(steps * slices - config.stages, 0), steps * slices)
      def _(n):
        plgpu.barrier_wait(consumed.at[slot_of(n)])

    def multiply(i, accumulator):
      """Returns the logits of the block's tile i."""

      def add(k):
        slot = slot_of(i * slices + k)
        plgpu.barrier_wait(loaded.at[arrival_of(i, k)])
        if config.resident:
          hidden_s = hidden.at[k]
        else:
          hidden_s = hidden.at[slot, pl.ds(worker * height, height)]
        plgpu.wgmma(accumulator, hidden_s, weight.at[slot].T)

      def release(k):
        plgpu.barrier_arrive(consumed.at[slot_of(i * slices + k)])

      add(0)

      @pl.loop(1, slices)
      def _(k):
        add(k)
        # With one product running, that of the slice before is done.
        plgpu.wgmma_wait(1)
        release(k - 1)

      logits = accumulator[...]
      release(slices - 1)
      return logits

    def compute():
      own = {name: ref.at[worker] for name, ref in scratch.items()}
      if config.resident:
        rows, part = pl.ds(first_row, height), split * WORKERS + worker
        plgpu.barrier_wait(resident)
        turn = lambda j: j * WORKERS + worker
        turns = lambda tiles: lax.div(
          tiles + (WORKERS - 1) - worker, jnp.int32(WORKERS)
        )
      else:
        rows, part = pl.ds(first_row + worker * height, height), split
        turn = turns = lambda j: j
      carry, step, finish = work(rows, part, operand_refs, out_ref, own)

      def tile_step(j, carry, last):
        logits = pl.run_scoped(
          lambda accumulator: multiply(turn(j), accumulator),
          plgpu.ACC(config.shape, jnp.float32),
        )
        return step((first + turn(j)) * span, logits, carry, last)

      some = functools.partial(tile_step, last=False)
      full = steps if whole == tiles else jnp.clip(whole - first, 0, steps)
      carry = lax.fori_loop(0, turns(full), some, carry)
      if whole < tiles:
        rest = functools.partial(tile_step, last=True)
        carry = lax.fori_loop(turns(full), turns(steps), rest, carry)
      finish(carry)

    @pl.when(worker < WORKERS)
    def _():
      plgpu.set_max_registers(_REGISTERS[0], action="increase")
      compute()

    @pl.when(worker == WORKERS)
    def _():
      plgpu.set_max_registers(_REGISTERS[1], action="decrease")
      load()

  if config.resident:
    count, copies, rings, users = slices, 1, WORKERS, 1
  else:
    count, copies, rings, users = config.stages, 2, 1, WORKERS
  barriers = {
    "loaded": plgpu.Barrier(
      num_arrivals=copies, num_barriers=rings * config.stages
    ),
    "consumed": plgpu.Barrier(num_arrivals=users, num_barriers=config.stages),
  }
  if config.resident:
    barriers["resident"] = plgpu.Barrier(num_arrivals=slices)
  run = plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types={
      "hidden": tile(count, TOKENS, DEPTH),
      "weight": tile(config.stages, span, DEPTH),
      **barriers,
      **scratch,
    },
    # Neighbours share hidden states, and all at work at a time the weights.
    grid=(tokens // TOKENS, config.splits),
    grid_names=("rows", "split"),
    num_threads=WORKERS + 1,
    thread_name="worker",
    kernel_name=name,
    # Four threads of a warp have a row, so reductions need no shared memory.
    compiler_params=plgpu.CompilerParams(
      approx_math=True, reduction_scratch_bytes=0
    ),
    interpret=interpret,
  )
  return run(hidden_TE, weight_VE, *operands)
