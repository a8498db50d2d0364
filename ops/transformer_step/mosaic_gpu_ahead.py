"""Weights of the next kernels of a layer, on their way to the L2 cache.

A kernel takes some microseconds to end and the next one to begin, in which
memory would rest. So a kernel that has all of its own weights asks for the
first of a later one's, which then come out of the cache.
"""

from collections.abc import Sequence
from typing import Any

from ops.mamba2_step.mosaic_gpu_product import CHUNK, prefetch


def bring(
  refs: Sequence[Any], layer, budget: int, splits: int, worker, workers: int,
  *, past: int = 0,
) -> None:  # fmt: skip
  """Asks for the first rows of some matrices.

  Args:
    refs: Weights of all layers, as `Product.operands` gives them, of one K.
    layer: int32 scalar.
    budget: Bytes, at most; 0 for nothing.
    splits: Blocks that share K, each of which begins at a row of its own.
    worker: int32 scalar, the number of this block.
    workers: Blocks of this kernel.
    past: Budgets that were spent on these matrices before.
  """
  share = refs[0].shape[1] * 8 // splits // CHUNK
  columns = sum(ref.shape[-1] for ref in refs)
  each = budget // (2 * CHUNK * columns * splits)
  first = min(past * each, share)
  count = min(each, share - first)
  if count > 0:
    for ref in refs:
      prefetch(
        ref, layer, count * CHUNK, worker, workers,
        first=first * CHUNK, splits=splits,
      )  # fmt: skip
