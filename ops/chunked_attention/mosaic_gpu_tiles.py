"""What the Mosaic GPU kernels of `chunked_attention` share: masks and walks.

Letters: I queries and J keys of a tile, D channels of a head. Blocks are 64
tokens, which is what a warpgroup takes.
"""

import dataclasses

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops.hopper_warpgroups import TILE

BLOCK = 64
LOG2E = float(np.log2(np.e))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels are launched.

  Attributes:
    workers: Warpgroups of a thread block that compute, of one block of queries,
      or of keys, each: 1 or 2.
    keys: Chunk keys of a tile in the forward pass and in queries' gradients.
    stages: Tiles in flight from memory in the forward pass.
    gradient_stages: The same in the gradients.
    queries: Queries of a step in the gradients of chunk keys.
    parts: Thread blocks that share the queries of a tile of chunk keys in its
      gradients.
    in_turns: Whether of two warpgroups one multiplies while the other takes
      exponentials, in the forward pass.
  """

  workers: int = 2
  keys: int = 128
  stages: int = 3
  gradient_stages: int = 2
  queries: int = 64
  parts: int = 1
  in_turns: bool = True

  @property
  def rows(self) -> int:
    """Queries of a thread block."""
    return BLOCK * self.workers


def walk(span, step, carry, *, first: bool, last: bool):
  """Folds `step(i, carry, masked)` over a span, i counted from its begin.

  Args:
    span: Four scalars of `spans.spans`.
    step: Of the tile `begin + i`.
    carry: Its first value.
    first: Whether tiles that need a mask may come first.
    last: Whether they may come last.
  """
  begin, start, stop, end = (bound - span[0] for bound in span)
  if first:
    carry = lax.fori_loop(begin, start, lambda i, c: step(i, c, True), carry)
  carry = lax.fori_loop(start, stop, lambda i, c: step(i, c, False), carry)
  if last:
    carry = lax.fori_loop(stop, end, lambda i, c: step(i, c, True), carry)
  return carry


def zeros(*shape: int) -> jax.Array:
  """A tile of zeros in registers."""
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)


def iota(shape, axis: int) -> jax.Array:
  """Places along an axis of a tile."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)


def line(ref, lines, layout) -> jax.Array:
  """Numbers of global memory, along a tile's rows or columns."""
  return plgpu.load(ref.at[lines], layout=layout, optimized=False)


def near_mask(query, key, window: int, starts=None) -> jax.Array:
  """Which pairs of tokens see each other; of slots and starts of a tile.

  A key in front of the row, below 0, is seen by none.
  """
  mask = (key <= query) & (query - key <= window) & (key >= 0)
  return mask if starts is None else mask & (key >= starts)


class Near:
  """The blocks of tokens around those of a thread block, in shared memory.

  Attributes:
    blocks: Blocks that are held.
    pieces: Blocks that a warpgroup meets: its own, and those of the window.
  """

  def __init__(self, config: Config, window: int, length: int):
    self.total, self.pieces = length // BLOCK, -(-window // BLOCK) + 1
    self.blocks = min(config.workers + self.pieces - 1, self.total)

  def begin(self, first) -> jax.Array:
    """The first block to hold, where it may be `first`, within the row."""
    return jnp.clip(first, 0, self.total - self.blocks)

  def place(self, block, begin) -> jax.Array:
    """Where a block is held; anything in range where it is not of the row."""
    return jnp.clip(block - begin, 0, self.blocks - 1)

  def each(self, step, carry):
    """Folds `step(piece, carry)` over all pieces."""
    if self.pieces <= 3:
      for piece in range(self.pieces):
        carry = step(jnp.int32(piece), carry)
      return carry
    # The first stands by itself: every query sees a key of its own block.
    carry = step(jnp.int32(0), carry)
    return lax.fori_loop(1, self.pieces, step, carry)
