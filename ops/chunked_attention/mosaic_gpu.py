"""The Mosaic GPU `chunked_attention` for Hopper: forward, backward, binding.

For 32,768 tokens in chunks of 8 and a window of 64, a query meets 2,048 chunk
keys on average and 65 tokens. A pair takes 4 * 64 FLOPs and an exponential: on
an H200 some .36 ms of the matrix units and .31 ms of the units for exponentials
for 16 heads, against .03 ms to move q, k, v and the results. Chunk keys of a
head are 1 MB, which the L2 cache holds. So products and exponentials bound the
kernels, as in attention to all tokens, and these have 7.6 times fewer of both.
128 chunk keys cover 1,024 queries: masks are needed in one tile of 16.

Measured there for one text of 32,768 tokens and 16 heads: .96 ms forward and
3.15 ms with gradients, .30 and .32 of what the matrix units could do
(docs/attamba.md).
"""

import functools

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.chunked_attention import mosaic_gpu_backward as backward
from ops.chunked_attention import mosaic_gpu_forward
from ops.chunked_attention.mosaic_gpu_tiles import BLOCK, Config, Near
from ops.hopper import PROCESSORS, SHARED_MEMORY

HEAD = 64
# The slot of keys that pad chunks: no query comes that late.
_NEVER = 2**30


def configure(
  length: int, chunks: int, heads: int, window: int
) -> Config | None:
  """Returns the Config for shapes, or None where shared memory is too small.

  Args:
    length: S.
    chunks: M.
    heads: Query heads of all rows.
    window: L.
  """
  workers = 2 if length > BLOCK else 1
  blocks = -(-chunks // (BLOCK * workers)) * heads
  parts = 1
  # The first tile of chunk keys is seen by nearly all queries, twice as many as
  # a tile is on average, so few tiles leave multiprocessors idle at the end.
  while blocks * parts < 3 * PROCESSORS and 1024 * parts <= length:
    parts *= 2
  for stages in (3, 2):
    config = Config(workers=workers, stages=stages, parts=min(parts, 8))
    if _shared_memory(config, length, window) <= SHARED_MEMORY:
      return config
  return None


def _shared_memory(config, length, window):
  """Bytes that the forward kernel and the gradients of queries take at most."""
  length = -(-length // config.rows) * config.rows
  near = 2 * BLOCK * Near(config, window, length).blocks
  tiles = 2 * config.keys
  forward = near + config.stages * tiles + config.rows
  gradients = near + config.gradient_stages * tiles + 2 * config.rows
  # Numbers of bfloat16, and some vectors, barriers and gaps between them.
  return 2 * HEAD * max(forward, gradients) + (1 << 12)


def supports(
  q=None, k=None, v=None, ends=None, *, window=0, top=None, scale=None
) -> str | None:
  """Returns why the kernels do not run, or None."""
  del k, v, ends
  reason = dispatch.needs_wgmma()
  if reason is not None or q is None:
    return reason
  return unfit(q, window, scale, top)


def unfit(
  q: jax.Array, window: int, scale: float | None, top: int | None = None
) -> str | None:
  """Returns why these arrays do not fit the kernels, or None."""
  if q.dtype != jnp.bfloat16:
    return f"takes bfloat16, not {q.dtype}"
  if q.shape[3] != HEAD:
    return f"takes heads of {HEAD} channels, not {q.shape[3]}"
  if scale is not None and not scale > 0:
    return f"takes a positive scale, not {scale}"
  if top is not None:
    return "takes all chunks, not those of the highest scores"
  if not q.size:
    return "takes at least one token"
  if configure(q.shape[1], 1, 1, window) is None:
    return f"has no room in shared memory for a window of {window} tokens"
  return None


def forward(
  q, k, v, chunk_k, chunk_v, ends, seen_from, starts, *,
  window, top=None, scale, interpret=False, config=None,
) -> jax.Array:  # fmt: skip
  """Implements `chunked_attention`; arguments as in `ops`, all of them given.

  But for `starts`, which may be None. Where tokens and chunks do not fill the
  kernels' tiles, zeros stand behind them, which costs a copy. `interpret` is
  False or `InterpretGPUParams`; `config` is by default that of `configure`.
  """
  if reason := unfit(q, window, scale, top):
    raise ValueError(f"chunked_attention: the Mosaic GPU kernel {reason}")
  b, s, h, d = q.shape
  m = ends.shape[1]
  config = config or configure(s, m, b * h, window)
  more = -s % config.rows
  if not m:
    chunk_k = chunk_v = jnp.zeros((b, 0, *k.shape[2:]), k.dtype)
  beyond = -m % max(config.keys, config.rows) if m else config.keys
  beyond += -(m + beyond) % config.rows
  pad = lambda x, count, value=0: (
    jnp.pad(
      x,
      [(0, count if i == 1 else 0) for i in range(x.ndim)],
      constant_values=value,
    )
    if count
    else x
  )
  if starts is not None:
    # Behind the last token nothing is seen by others, and of others nothing.
    starts = pad(starts, more, s)
  out = attend(
    window,
    float(scale),
    config,
    interpret,
    pad(q, more),
    pad(k, more),
    pad(v, more),
    pad(chunk_k, beyond),
    pad(chunk_v, beyond),
    pad(ends, beyond, _NEVER),
    pad(seen_from, beyond, _NEVER),
    starts,
  )
  return out[:, :s]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def attend(window, scale, config, interpret, *arrays):
  """The op on whole tiles; arrays as `mosaic_gpu_forward.attend` has them."""
  return _attend(window, scale, config, interpret, *arrays)[0]


# Compiled by themselves, so that many layers lower their kernels once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attend(window, scale, config, interpret, *arrays):
  return mosaic_gpu_forward.attend(
    *arrays, window=window, scale=scale, config=config, interpret=interpret
  )


def _push(window, scale, config, interpret, *arrays):
  out, log = _attend(window, scale, config, interpret, *arrays)
  return out, (arrays, out, log)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gradients(window, scale, config, interpret, kept, dout):
  arrays, out, log = kept
  q, k, v, chunk_k, chunk_v, ends, seen_from, starts = arrays
  wide = lambda x: x.astype(jnp.float32)
  dot = jnp.einsum("bshd,bshd->bhs", wide(out), wide(dout))
  rest = {"scale": scale, "config": config, "interpret": interpret}
  dq = backward.of_queries(*arrays, log, dot, dout, window=window, **rest)
  dk, dv = backward.of_tokens(
    q, k, v, starts, log, dot, dout, window=window, **rest
  )
  chunks = backward.of_chunks(
    q, chunk_k, chunk_v, ends, seen_from, starts, log, dot, dout, **rest
  )
  shared = lambda x, like: (
    x
    if x.shape == like.shape
    else wide(x).reshape(*like.shape[:3], -1, like.shape[3]).sum(axis=3)
  ).astype(like.dtype)
  dchunk_k, dchunk_v = (shared(x.sum(axis=0), chunk_k) for x in chunks)
  return dq, shared(dk, k), shared(dv, v), dchunk_k, dchunk_v


def _pull(window, scale, config, interpret, kept, dout):
  gradients = _gradients(window, scale, config, interpret, kept, dout)
  return *gradients, None, None, None


attend.defvjp(_push, _pull)
