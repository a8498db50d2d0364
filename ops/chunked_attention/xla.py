"""`chunked_attention` by XLA: blocks of queries, no S x S array."""

import jax
import jax.numpy as jnp
from jax import lax

from ops.top_mask import top_mask

# Finite, so that a query that sees no chunk is no NaN.
_UNSEEN = -1e30
# Queries of a block of the window: fewer make small products, more see keys
# that they must not.
_LEAST_BLOCK, _MOST_BLOCK = 16, 256
# Scores with chunk keys that are held at a time: 1 GiB of float32.
_MOST_SCORES = 1 << 28


def forward(
  q, k, v, chunk_k, chunk_v, ends, seen_from, starts, *, window, top, scale
) -> jax.Array:
  """Implements `chunked_attention`; arguments as in `ops`, all of them given.

  But for `starts`, which may be None.
  """
  if starts is None:
    starts = jnp.zeros((1, q.shape[1]), jnp.int32)
  b, s, h, d = q.shape
  q = q.reshape(b, s, k.shape[2], -1, d)
  near = _of_window(q, k, v, starts, window, scale)
  if not ends.shape[1]:
    return near[0].astype(q.dtype).reshape(b, s, h, d)
  far = _of_chunks(q, chunk_k, chunk_v, ends, seen_from, starts, top, scale)
  # The share of the chunks in the sum of both exponentials.
  share = jax.nn.sigmoid(far[1] - near[1])[..., None]
  out = near[0] * (1 - share) + far[0] * share
  return out.astype(q.dtype).reshape(b, s, h, d)


def _softmax(scores, seen, product):
  """`product` of the shares, and the log-sum-exp over the last axis."""
  scores = jnp.where(seen, scores, _UNSEEN)
  # It cancels in the quotient and needs no gradient.
  most = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  exps = jnp.exp(scores - most)
  total = jnp.sum(exps, axis=-1, keepdims=True)
  return product(exps / total), (jnp.log(total) + most)[..., 0]


def _of_window(q, k, v, starts, window, scale):
  """Outputs (B, S, N, G, D) and log-sum-exps (B, S, N, G) of the windows.

  A block of queries sees its own keys and those of the blocks in front that
  reach into the window.
  """
  b, s, n, g, d = q.shape
  size = min(max(window, _LEAST_BLOCK), _MOST_BLOCK, s)
  before = -(-window // size)
  blocks = -(-s // size)
  pad = lambda x: jnp.pad(
    x, [(0, 0), (0, blocks * size - s)] + [(0, 0)] * (x.ndim - 2)
  )
  cut = lambda x: pad(x).reshape(x.shape[0], blocks, size, *x.shape[2:])

  def reach(x):
    padded = jnp.pad(cut(x), [(0, 0), (before, 0), (0, 0), (0, 0), (0, 0)])
    parts = [padded[:, i : i + blocks] for i in range(before + 1)]
    return jnp.concatenate(parts, axis=2)

  first = size * jnp.arange(blocks, dtype=jnp.int32)[:, None]
  at = first + jnp.arange(size, dtype=jnp.int32)[None]
  of = first + jnp.arange(-before * size, size, dtype=jnp.int32)[None]
  at, of = at[None, :, :, None], of[None, :, None, :]
  seen = (of <= at) & (of >= at - window) & (of >= cut(starts)[..., None])
  scores = scale * jnp.einsum(
    "bxqngd,bxknd->bxngqk",
    cut(q),
    reach(k),
    preferred_element_type=jnp.float32,
  )
  out, logs = _softmax(
    scores,
    (seen & (of >= 0))[:, :, None, None],
    lambda shares: jnp.einsum(
      "bxngqk,bxknd->bxqngd",
      shares.astype(v.dtype),
      reach(v),
      preferred_element_type=jnp.float32,
    ),
  )
  whole = lambda x: x.reshape(b, blocks * size, *x.shape[3:])[:, :s]
  return whole(out), whole(jnp.moveaxis(logs, -1, 2))


def _best(scores, seen, top):
  """Which of the keys in sight (B, N, 1, Q, M) have the highest scores.

  Heads of a key choose together, by the sum of their scores.
  """
  total = jnp.sum(scores, axis=2, keepdims=True)
  total = jnp.where(seen, total, -jnp.inf)
  counts = jnp.full(total.shape[:-1], top, jnp.int32)
  return seen & top_mask(total, counts)


def _of_chunks(q, k, v, ends, seen_from, starts, top, scale):
  """The same of the chunk keys, for blocks of queries where there are many."""
  b, s, n, g, _ = q.shape
  slots = jnp.arange(s, dtype=jnp.int32)
  starts = jnp.broadcast_to(starts, (b, s))

  def attend(q, slots, starts):
    scores = scale * jnp.einsum(
      "bqngd,bmnd->bngqm", q, k, preferred_element_type=jnp.float32
    )
    seen = seen_from[:, None] <= slots[None, :, None]
    seen = seen & (ends[:, None] >= starts[..., None])
    seen = seen[:, None, None]
    if top is not None:
      seen = _best(scores, seen, top)
    out, logs = _softmax(
      scores,
      seen,
      lambda shares: jnp.einsum(
        "bngqm,bmnd->bqngd",
        shares.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
      ),
    )
    return out, jnp.moveaxis(logs, -1, 1)

  size = max(_MOST_SCORES // (b * n * g * k.shape[1]), 1)
  if size >= s:
    return attend(q, slots, starts)
  pad = lambda x, axis: jnp.pad(
    x,
    [(0, -s % size if i == axis else 0) for i in range(x.ndim)],
  )
  cut = lambda x: jnp.moveaxis(
    pad(x, 1).reshape(b, -1, size, *x.shape[2:]), 1, 0
  )
  blocks = cut(q), pad(slots, 0).reshape(-1, size), cut(starts)
  found = lax.map(lambda block: jax.checkpoint(attend)(*block), blocks)
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :s], found
  )
