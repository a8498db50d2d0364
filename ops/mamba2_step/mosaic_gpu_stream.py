"""What products onto the residual stream share, with a norm behind them.

The stream is narrow: it has fewer blocks of columns than there are
multiprocessors. So the blocks of a cluster may share K; the first one adds up
what the others store to its shared memory. The next product takes the stream
times the norm's scale, and the sums of its squares.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_tiles import ROWS
from ops.mamba2_step.mosaic_gpu_product import PARTIALS, Product


def launch(matmul: Product, width: int) -> dict:
  """Arguments of `plgpu.kernel`, but for name and compiler.

  Its results are those of `write`, (N, D) float32 and bfloat16, and (N, .)
  float32 in as many columns as the next product takes sums of squares in.

  Args:
    matmul: The product.
    width: D.
  """
  rows, blocks = matmul.rows, -(-width // matmul.columns)
  tiles = width // matmul.finished[1]
  padded = -(-tiles // PARTIALS) * PARTIALS
  return {
    "out_type": (
      jax.ShapeDtypeStruct((rows, width), jnp.float32),
      jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
      jax.ShapeDtypeStruct((rows, padded), jnp.float32),
    ),
    "grid": (blocks,),
    "grid_names": ("columns",),
    **shared(matmul),
    **matmul.launch(),
  }


def shared(matmul: Product) -> dict:
  """Arguments of `plgpu.kernel` for blocks that share K: see `add_up`."""
  splits, scratch = matmul.splits, matmul.scratch()
  if splits > 1 and not matmul.exchange:
    scratch["others"] = plgpu.SMEM(
      (splits - 1, matmul.rows, matmul.columns),
      jnp.float32,
      transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
    )
    scratch["arrived"] = plgpu.Barrier(num_arrivals=splits - 1)
  return {"scratch_types": scratch, **cluster(splits)}


def cluster(splits: int) -> dict:
  """Arguments of `plgpu.kernel` for blocks that share K, but for memory."""
  if splits == 1:
    return {}
  return {"cluster": (splits,), "cluster_names": ("split",)}


def sums_of(s: dict) -> Any:
  """Where the first warpgroup of a product has its sums, (N, columns + 4).

  With weights of few bits each warpgroup has such a place.
  """
  sums = s["sums"]
  return sums.at[0] if len(sums.shape) > 2 else sums


def write(
  outs: tuple[Any, Any, Any],
  added: jax.Array,
  before: jax.Array,
  norm,
  rows=slice(None),
  tile=None,
) -> None:
  """Writes a block's columns of the stream, and what its norm is made of.

  Args:
    outs: References, as `launch` has them.
    added: (N, columns) float32, what is added.
    before: The stream in front, alike.
    norm: (columns,) scales of the norm behind.
    rows: Those that are given, as a slice.
    tile: Which of all such columns these are, by default the block's.
  """
  stream_ref, scaled_ref, squares_ref = outs
  columns = added.shape[1]
  tile = lax.axis_index("columns") if tile is None else tile
  own = pl.ds(tile * columns, columns)
  new = before + added
  hopper_tiles.store(stream_ref.at[rows, own], new)
  scaled = new * hopper_tiles.repeat(norm, 1, new.shape, ROWS)
  hopper_tiles.store(scaled_ref.at[rows, own], scaled.astype(scaled_ref.dtype))
  hopper_tiles.store(squares_ref.at[rows, tile], jnp.sum(new * new, axis=1))


def add_up(
  added: jax.Array,
  s: dict,
  splits: int,
  finish: Callable[[jax.Array], None],
) -> None:
  """Calls `finish` with the sum over a cluster, in its first block.

  Args:
    added: What this block has found of K.
    s: Shared memory of `shared`.
    splits: Blocks of a cluster.
    finish: Takes the sum.
  """
  if splits == 1:
    finish(added)
    return
  split = lax.axis_index("split")

  @pl.when(split > 0)
  def _():
    plgpu.async_store_smem(
      added, s["others"].at[split - 1], s["arrived"],
      cluster_idx=jnp.int32(0), cluster_dim="split", optimized=False,
    )  # fmt: skip

  @pl.when(split == 0)
  def _():
    plgpu.barrier_wait(s["arrived"])
    others = [
      hopper_tiles.load(s["others"].at[k], ROWS) for k in range(splits - 1)
    ]
    finish(functools.reduce(operator.add, others, added))
