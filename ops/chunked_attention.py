"""Attention over compressed chunks of the past and a window of recent keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import dispatch

IMPLEMENTATIONS = dispatch.XLA_ONLY

# Slots of a chunk key that stands for no chunk.
UNUSED = 2**30
# Finite, so that a query that sees no chunk is no NaN.
_UNSEEN = -1e30
# Queries of a block of the window: fewer make small products, more see keys
# that they must not.
_LEAST_BLOCK, _MOST_BLOCK = 16, 256
# Scores with chunk keys that are held at a time: 1 GiB of float32.
_MOST_SCORES = 1 << 28


def chunked_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ends: jax.Array,
  *,
  window: int,
  chunk_k: jax.Array | None = None,
  chunk_v: jax.Array | None = None,
  seen_from: jax.Array | None = None,
  starts: jax.Array | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attends to the last keys one by one, and to earlier ones by chunks.

  Attamba (https://arxiv.org/abs/2411.17685, equation 8): query t sees the keys
  of the window t - L to t, and one key of each chunk in front of it,

    out_t = softmax(scale * q_t . [k_{t-L..t}, chunk_k_m | m is seen by t]) .
            [v_{t-L..t}, chunk_v_m]

  Both parts have a softmax of their own, merged by their log-sum-exp. Query
  head h reads key head h // (H / N). With every token a chunk it is
  `jax.nn.dot_product_attention(q, k, v, is_causal=True)`.

  Args:
    q: (B, S, H, D), bfloat16 or float32.
    k: (B, S, N, D).
    v: (B, S, N, D).
    ends: Slot of each chunk's last token, (B, M) int32, rising in each row;
      `UNUSED` behind the last chunk. Rows may have other boundaries.
    window: L >= 0, earlier tokens that a query sees one by one.
    chunk_k: Key of each chunk, (B, M, N, D); None for k at `ends`.
    chunk_v: Value of each chunk, (B, M, N, D); None for v at `ends`.
    seen_from: First slot whose query sees the chunk, (B, M) int32, behind its
      end; None for `ends + window + 1`, where the window no longer shows the
      chunk's last token: where chunk keys are those of last tokens, each is
      seen once.
    starts: Slot at which the text of each token begins, (B, S) int32: nothing
      in front of it is seen. None for 0.
    scale: Factor of the logits, D**-0.5 by default.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    (B, S, H, D) in q's dtype. Logits and sums are float32. Work and memory are
    of the order of B H S (M + L), also for the gradients, which q, k, v,
    chunk_k and chunk_v have.

  Raises:
    ValueError: Shapes do not fit each other, or the window is negative.
  """
  _check(q, k, v, ends, window, chunk_k, chunk_v, seen_from, starts)
  dispatch.resolve("chunked_attention", IMPLEMENTATIONS, implementation)
  if chunk_k is None:
    take = lambda x: jnp.take_along_axis(
      x, jnp.minimum(ends, x.shape[1] - 1)[..., None, None], axis=1, mode="clip"
    )
    chunk_k, chunk_v = take(k), take(v)
  if seen_from is None:
    seen_from = ends + (window + 1)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if starts is None:
    starts = jnp.zeros((1, q.shape[1]), jnp.int32)
  b, s, h, d = q.shape
  q = q.reshape(b, s, k.shape[2], -1, d)
  near = _of_window(q, k, v, starts, window, scale)
  if not ends.shape[1]:
    return near[0].astype(q.dtype).reshape(b, s, h, d)
  far = _of_chunks(q, chunk_k, chunk_v, ends, seen_from, starts, scale)
  # The share of the chunks in the sum of both exponentials.
  share = jax.nn.sigmoid(far[1] - near[1])[..., None]
  out = near[0] * (1 - share) + far[0] * share
  return out.astype(q.dtype).reshape(b, s, h, d)


def _check(q, k, v, ends, window, chunk_k, chunk_v, seen_from, starts):
  op = "chunked_attention"
  if q.ndim != 4 or k.ndim != 4 or ends.ndim != 2:
    raise ValueError(
      f"{op}: q is {q.shape}, k {k.shape} and ends {ends.shape}, not "
      "(B, S, H, D), (B, S, N, D) and (B, M)"
    )
  b, s, h, d = q.shape
  n, m = k.shape[2], ends.shape[1]
  wanted = {
    "k": (k, (b, s, n, d)),
    "v": (v, (b, s, n, d)),
    "ends": (ends, (b, m)),
    "chunk_k": (chunk_k, (b, m, n, d)),
    "chunk_v": (chunk_v, (b, m, n, d)),
    "seen_from": (seen_from, (b, m)),
    "starts": (starts, (b, s)),
  }
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(
        f"{op}: {name} is {value.shape}, but q {q.shape} and ends {ends.shape} "
        f"need {shape}"
      )
  if (chunk_k is None) != (chunk_v is None):
    raise ValueError(f"{op}: chunk_k and chunk_v come together or not at all")
  if not n or h % n:
    raise ValueError(f"{op}: {h} query heads for {n} key heads")
  if window < 0:
    raise ValueError(f"{op}: window is {window}, it must be at least 0")


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


def _of_chunks(q, k, v, ends, seen_from, starts, scale):
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
    out, logs = _softmax(
      scores,
      seen[:, None, None],
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


def chunked_attention_reference(
  q,
  k,
  v,
  ends,
  *,
  window,
  chunk_k=None,
  chunk_v=None,
  seen_from=None,
  starts=None,
  scale=None,
):
  """The specification in float64, one query of one head at a time."""
  wide = functools.partial(np.asarray, dtype=np.float64)
  q, k, v = wide(q), wide(k), wide(v)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  group = q.shape[2] // k.shape[2]
  out = np.zeros_like(q)
  for b, t, h in np.ndindex(*q.shape[:3]):
    n = h // group
    start = 0 if starts is None else int(starts[b, t])
    first = max(t - window, start)
    keys, values = list(k[b, first : t + 1, n]), list(v[b, first : t + 1, n])
    for m, end in enumerate(np.asarray(ends[b]).tolist()):
      seen = end + window + 1 if seen_from is None else int(seen_from[b, m])
      if seen > t or end < start:
        continue
      keys.append(k[b, end, n] if chunk_k is None else wide(chunk_k[b, m, n]))
      values.append(v[b, end, n] if chunk_v is None else wide(chunk_v[b, m, n]))
    logits = scale * (np.stack(keys) @ q[b, t, h])
    shares = np.exp(logits - logits.max())
    out[b, t, h] = shares @ np.stack(values) / shares.sum()
  return out
