"""The Mosaic GPU `paged_sparse_attention` for Hopper: two kernels.

- `mosaic_gpu_scores` reads all summaries once and scores their pages;
- `mosaic_gpu_attend` chooses, and reads the pages that it has chosen.

What the second kernel's blocks found is merged by XLA. Both read caches where
they lie, by an index of the layer that lies in memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch, hopper_attention
from ops.hopper import PROCESSORS, SHARED_MEMORY
from ops.hopper_attention import OF_TILE, QUERIES
from ops.hopper_tiles import TILE
from ops.paged_sparse_attention import mosaic_gpu_attend, mosaic_gpu_scores

HEAD_SIZES = (64, 128)
PAGE_SIZES = (8, 16, 32, 64)
# Sort keys that a thread may hold in its registers, times 128 threads.
MAX_PAGES = 8192
# Pages of scores are padded to so many.
_ROOM = 4 * TILE
# Tiles in flight, at least, where shares of a head can be small enough for it.
_LEAST_STAGES = 4
_LOG2E = 1 / np.log(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels are launched.

  Attributes:
    splits: Thread blocks that share the pages of a row's head.
    stages: Tiles of 64 keys or values in shared memory.
  """

  splits: int = 1
  stages: int = 8


def configure(
  batch: int, heads: int, size: int, pages: int, page_size: int, max_pages: int
) -> Config:
  """Returns the Config for B, N, K, P, slots of a page and pages to keep; pure.

  Two blocks run on a multiprocessor, all of them at once where they can.
  """
  tiles = -(-max_pages * page_size // TILE)
  wanted = max(1, 2 * PROCESSORS // (batch * heads))

  def stages(splits):
    free = SHARED_MEMORY // 2 - 8192 - OF_TILE * -(-tiles // splits)
    free -= 4 * (padded(pages) + -(-max_pages // splits))
    return min(free // (2 * TILE * size), 16)

  splits = min(wanted, tiles)
  while stages(splits) < _LEAST_STAGES and splits < tiles:
    splits += 1
  return Config(splits=splits, stages=max(2, stages(splits)))


def padded(pages: int) -> int:
  """Pages that there are scores for."""
  return -(-pages // _ROOM) * _ROOM


def supports(
  q=None, keys=None, values=None, summary=None, lengths=None, num_pages=None,
  **options,
) -> str | None:  # fmt: skip
  """Returns None where `forward` runs on these arguments, else why not."""
  if reason := dispatch.needs_wgmma():
    return reason
  return None if q is None else unfit(q, keys, values, summary)


def unfit(q, keys, values, summary) -> str | None:
  """Returns None if the kernels take these shapes and dtypes, else why not."""
  named = {
    "q": q, "keys": keys, "values": values, "summary": summary.first,
    "summary.second": summary.second,
  }  # fmt: skip
  for name, array in named.items():
    if array.dtype != jnp.bfloat16:
      return f"needs bfloat16, {name} is {array.dtype}"
  slots, heads, size = keys.shape[1:]
  pages = summary.first.shape[1]
  if size not in HEAD_SIZES:
    return f"needs heads of 64 or 128, keys are {keys.shape}"
  if q.shape[1] > QUERIES * heads:
    return f"needs at most {QUERIES} queries to a key"
  if slots // pages not in PAGE_SIZES:
    return f"needs pages of 8, 16, 32 or 64 slots, not {slots // pages}"
  if pages % 8 or not TILE <= pages <= MAX_PAGES:
    return f"needs {TILE} to {MAX_PAGES} pages, a multiple of 8, not {pages}"
  return None


def forward(
  q, keys, values, summary, lengths, num_pages,
  *, max_pages, scale, interpret=False, config=None,
) -> jax.Array:  # fmt: skip
  """Implements `paged_sparse_attention` on Hopper; num_pages is (B, N).

  `interpret` is False or `InterpretGPUParams`; `config` is by default that of
  `configure`.
  """
  if reason := unfit(q, keys, values, summary):
    raise ValueError(f"paged_sparse_attention: the Mosaic GPU kernel {reason}")
  stacked = jax.tree.map(lambda x: x[None], (keys, values, summary))
  return attend_in_layer(
    np.zeros(1, np.int32), q, *stacked, lengths, num_pages,
    max_pages=max_pages, scale=scale, interpret=interpret, config=config,
  )  # fmt: skip


def attend_in_layer(
  layer, q, keys, values, summary, lengths, num_pages,
  *, max_pages, scale, interpret=False, config=None,
) -> jax.Array:  # fmt: skip
  """As `forward`, of a layer of stacked caches and summaries.

  Args:
    layer: (1,) int32.
    q: (B, H, K).
    keys: (L, B, S, N, K), as values.
    values: Alike.
    summary: Of all layers, (L, B, P, N, K).
    lengths: (B,) int32.
    num_pages: (B, N) int32.
    max_pages: As in `paged_sparse_attention`, as scale.
    scale: Alike.
    interpret: False, or the parameters of the interpreter.
    config: A Config, or None for that of `configure`.
  """
  batch, slots, heads, size = keys.shape[1:]
  pages = summary.first.shape[2]
  if config is None:
    config = configure(batch, heads, size, pages, slots // pages, max_pages)
  own = q.reshape(batch, heads, -1, size)
  shared = own.shape[2]
  own = jnp.pad(own, ((0, 0), (0, 0), (0, QUERIES - shared), (0, 0)))
  scores = mosaic_gpu_scores.page_scores(
    layer, own, (summary.first, summary.second), lengths, shared=shared,
    kind=summary.kind, page_size=slots // pages, room=padded(pages),
    interpret=interpret,
  )  # fmt: skip
  found = mosaic_gpu_attend.attend(
    layer, own, (keys, values), scores.reshape(batch, heads, -1, TILE), lengths,
    num_pages, pages=pages, max_pages=max_pages, scale=scale * _LOG2E,
    splits=config.splits, stages=config.stages, interpret=interpret,
  )  # fmt: skip
  mixed = hopper_attention.merged(*found)
  return mixed[:, :, :shared].reshape(q.shape).astype(q.dtype)
