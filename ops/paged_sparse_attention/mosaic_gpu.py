"""The Mosaic GPU `paged_sparse_attention` for Hopper: one kernel.

`mosaic_gpu_attend` reads all summaries once, chooses pages, and reads these. It
reads caches where they lie, by an index of the layer that lies in memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch
from ops.hopper import PROCESSORS
from ops.hopper_attention import OF_TILE, QUERIES
from ops.hopper_tiles import TILE
from ops.paged_sparse_attention import mosaic_gpu_attend, xla
from ops.paged_sparse_attention import mosaic_gpu_choice as choice
from ops.paged_sparse_attention.summary import PageSummary

HEAD_SIZES = (64, 128)
PAGE_SIZES = (8, 16, 32, 64)
# Sort keys that a thread may hold in its registers, times 128 threads.
MAX_PAGES = 8192
# Thread blocks of a cluster, at most.
_WIDEST = 16
# Tiles of 64 keys that a block of a cluster should have.
_LEAST_TILES = 8
_MOST_STAGES = 16
# Bytes of shared memory of a multiprocessor, and those that a block takes of
# them for itself, for sums over threads, barriers and gaps.
_OF_PROCESSOR, _OF_BLOCK = 228 * 1024, 10 * 1024
_LOG2E = 1 / np.log(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched.

  Attributes:
    splits: Thread blocks that share the pages of a row's head: 1, 2, 4, 8, 16.
    stages: Tiles of 64 keys, values or pages in shared memory.
    tiles: Tiles of 64 scores in shared memory.
  """

  splits: int = 1
  stages: int = 8
  tiles: int = 8


def configure(
  batch: int, heads: int, size: int, pages: int, page_size: int, max_pages: int
) -> Config:
  """Returns the Config for B, N, K, P, slots of a page and pages to keep; pure.

  All blocks run at once where they can, two on a multiprocessor: one that has
  room for one alone does not take all blocks of large clusters.
  """
  most, splits, shared = -(-max_pages * page_size // TILE), 1, batch * heads
  # With fewer tiles a block does little but wait for the others.
  widest = min(_WIDEST, max(most // _LEAST_TILES, 1))
  while 2 * splits <= widest and 2 * splits * shared <= 2 * PROCESSORS:
    splits *= 2
  return fill(splits, -(-most // splits), 2, size, pages, max_pages)


def fill(
  splits: int, most: int, blocks: int, size: int, pages: int, max_pages: int
) -> Config:
  """Returns the Config whose blocks fill a multiprocessor's shared memory.

  Args:
    splits: As in `Config`.
    most: Tiles of keys that a block takes, at most.
    blocks: Of a multiprocessor.
    size: K.
    pages: P.
    max_pages: Pages that are kept at most.
  """
  block, times = choice.list_sizes(-(-max_pages // splits))
  free = _OF_PROCESSOR // blocks - _OF_BLOCK - 3 * 2 * QUERIES * size
  free -= 4 * (3 * choice.rows_of(pages) + block * times)
  tiles = min(most, 16 // blocks)
  stages = (free - OF_TILE * tiles) // (2 * TILE * size)
  return Config(
    splits=splits, stages=max(2, min(stages, _MOST_STAGES)), tiles=tiles
  )


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
  *, max_pages, scale, summarize=False, interpret=False, config=None,
):  # fmt: skip
  """Implements `paged_sparse_attention` on Hopper; num_pages is (B, N).

  `interpret` is False or `InterpretGPUParams`; `config` is by default that of
  `configure`. Gradients are those of XLA's implementation.
  """
  if reason := unfit(q, keys, values, summary):
    raise ValueError(f"paged_sparse_attention: the Mosaic GPU kernel {reason}")
  options = _Options(
    summary.kind, max_pages, float(scale), summarize, config, interpret
  )
  out, *last = _differentiable(
    options, q, keys, values, summary.first, summary.second, lengths, num_pages
  )
  return (out, PageSummary(*last, summary.kind)) if summarize else out


class _Options(NamedTuple):
  """What `forward` is called with besides arrays."""

  kind: str
  max_pages: int
  scale: float
  summarize: bool
  config: Config | None
  interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(options, *arrays):
  return _compiled_once(options, *arrays)


# A function of its own, since it is lowered and compiled once for all calls.
@functools.partial(jax.jit, static_argnums=0)
def _compiled_once(options, *arrays):
  return _rows(options)(*arrays)


def _with_residuals(options, *arrays):
  return _differentiable(options, *arrays), arrays


def _gradients(options, arrays, cotangents):
  *caches, first, second, lengths, num_pages = arrays
  summary = PageSummary(first, second, options.kind)

  def portable(*caches):
    found = xla.forward(
      *caches, summary, lengths, num_pages, max_pages=options.max_pages,
      scale=options.scale, summarize=options.summarize,
    )  # fmt: skip
    return tuple(jax.tree.leaves(found))

  _, back = jax.vjp(portable, *caches)
  # Which pages are kept does not depend on the summary smoothly.
  return *back(cotangents), *[None] * 4


_differentiable.defvjp(_with_residuals, _gradients)


def _rows(options: _Options) -> Callable[..., tuple[jax.Array, ...]]:
  """Returns the kernel of arrays, to which what is mapped over are rows."""

  @jax.custom_batching.custom_vmap
  def run(q, keys, values, first, second, lengths, num_pages):
    summary = PageSummary(first, second, options.kind)
    stacked = jax.tree.map(lambda x: x[None], (keys, values, summary))
    return attend_in_layer(
      np.zeros(1, np.int32), q, *stacked, lengths, num_pages[None],
      max_pages=options.max_pages, scale=options.scale,
      summarize=options.summarize, interpret=options.interpret,
      config=options.config,
    )  # fmt: skip

  @run.def_vmap
  def mapped(size, batched, *arrays):
    several = (
      x if own else jnp.broadcast_to(x, (size, *x.shape))
      for own, x in zip(batched, arrays)
    )
    found = run(*(x.reshape(-1, *x.shape[2:]) for x in several))
    back = lambda x: x.reshape(size, -1, *x.shape[1:])
    return tuple(map(back, found)), (True,) * len(found)

  return run


def attend_in_layer(
  layer, q, keys, values, summary, lengths, num_pages,
  *, max_pages, scale, shared=None, summarize=False, interpret=False,
  config=None,
) -> tuple[jax.Array, ...]:  # fmt: skip
  """As `forward`, of a layer of stacked caches and summaries.

  With `summarize` the summary of each row's last page comes behind the result,
  as two arrays (B, 1, N, K).

  Args:
    layer: (1,) int32.
    q: (B, H, K); or more rows, to which nothing is attended; or with `shared`
      (B, N Q, K), Q queries a key head.
    keys: (L, B, S, N, K), as values.
    values: Alike.
    summary: Of all layers, (L, B, P, N, K).
    lengths: (B,) int32.
    num_pages: Of all layers, (L, B, N) int32.
    max_pages: As in `paged_sparse_attention`, as scale.
    scale: Alike.
    shared: Of Q those that count, the first ones; None for all.
    summarize: Alike.
    interpret: False, or the parameters of the interpreter.
    config: A Config, or None for that of `configure`.
  """
  batch, slots, heads, size = keys.shape[1:]
  pages = summary.first.shape[2]
  if config is None:
    config = configure(batch, heads, size, pages, slots // pages, max_pages)
  shared = shared or q.shape[1] // heads
  return mosaic_gpu_attend.attend(
    layer, q, (keys, values), (summary.first, summary.second), lengths,
    num_pages, shared=shared, kind=summary.kind, max_pages=max_pages,
    scale=scale * _LOG2E, summarize=summarize, config=config,
    interpret=interpret,
  )  # fmt: skip
