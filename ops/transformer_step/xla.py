"""`transformer_step` in plain JAX, in which nothing large is copied.

XLA copies what a scan slices of stacked arrays wherever a matrix product reads
it, because such a product takes whole arrays alone: so a step would move the
weights three times, and the caches too. A sum of products, in contrast, is
fused with the slice that it reads. So products of few rows, and attention of
few queries, are written as such sums for a GPU. (On a CPU sums are no better,
and a TPU fuses slices with products.)

How they are written decides whether XLA fuses them; this was found from its
programs for a Hopper GPU:

- XLA likes to sum over the last axis in memory, and stores a whole array anew
  to have it so. A `lax.reduce` of several sums leaves its operands as they are;
  the sums of parts are merged by one, for that reason.
- A matrix has one part for some thousand threads. A barrier keeps the sums of
  parts from becoming one sum again.

Shapes by axis letter: R rows of a product, or queries of a key/value head; C
chunks of the S slots, P slots of a chunk; others as in `transformer_step`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from ops import dispatch
from ops.paged_sparse_attention import write_page_summary
from ops.quantized import as_array, is_quantized, rounded
from ops.quantized_matmul import quantized_matmul
from ops.rms_norm import rms_norm
from ops.transformer_step import xla_paged

# Rows up to which a product is written as sums: XLA computes two of them at
# once, and what a second pair reads is still in the cache of the GPU.
FEW_ROWS = 4
# Queries of a key/value head up to which attention is written as sums.
FEW_QUERIES = 16
# Sums that one part of a matrix gives, at least: fewer threads are too few.
_PART = 16384
# Slots of a chunk, at most.
_CHUNK = 128
# Finite, so that rows that see nothing are no NaN.
_UNSEEN = -1e30


def sums_are_fused() -> bool:
  """Whether sums, and not products, read slices of arrays where they lie."""
  return dispatch.platform() == "gpu"


def forward(x, weights, keys, values, lengths, frequencies, *, eps, pages=None):
  """Implements `transformer_step`; arguments as there."""
  slots = lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
  angles = slots[..., None, None].astype(jnp.float32) * jnp.asarray(
    frequencies, jnp.float32
  ).reshape(1, 1, 1, -1)

  def layer(x, both):
    w, *cache = both
    x, new = _layer(w, x, *cache, lengths, angles, eps)
    # All is read before anything is written: XLA would else keep the old
    # caches by copying them.
    return lax.optimization_barrier((x, new))

  x, (new, last) = lax.scan(layer, x, (weights, keys, values, pages))
  rows = jnp.arange(x.shape[0])[:, None]
  write = lambda whole, part: whole.at[:, rows, slots].set(part, mode="drop")
  found = x, *jax.tree.map(write, (keys, values), new)
  if pages is None:
    return found
  return *found, written(pages.summary, last, keys.shape[2], lengths)


def written(summary, last, slots, lengths):
  """The summaries of all layers with those of the new tokens' pages."""
  write = functools.partial(
    write_page_summary,
    lengths=lengths + 1,
    page_size=slots // summary.first.shape[2],
  )
  return jax.vmap(write)(summary, last)


def _layer(w, x, keys, values, pages, lengths, angles, eps):
  """One layer: x (B, T, D), and what the new tokens add to the caches.

  That is keys and values (B, T, N, K), and the summary of their page. `w` are
  weights without the axis L, as are `keys`, `values` and `pages`.
  """
  dtype, size = keys.dtype, keys.shape[-1]
  norm = lambda x, scale: rms_norm(
    x, scale, eps=eps, dtype=dtype, implementation="xla"
  )
  normed = norm(x, w.attn_norm)
  q, k, v = (
    _with_bias(product(normed, kernel), bias).reshape(*x.shape[:2], -1, size)
    for kernel, bias in (
      (w.q_proj, w.q_bias), (w.k_proj, w.k_bias), (w.v_proj, w.v_bias)
    )
  )  # fmt: skip
  if w.q_norm is not None:
    q, k = norm(q, w.q_norm), norm(k, w.k_norm)
  q, k = _rotated(q, angles), _rotated(k, angles)
  k, v = rounded(k, w.taps.k), rounded(v, w.taps.v)
  last = None
  if pages is None:
    mixed = attend(q, k, v, keys, values, lengths)
  else:
    mixed, last = xla_paged.attend(q, k, v, keys, values, pages, lengths)
  x = x + product(mixed.reshape(*x.shape[:2], -1), w.o_proj)
  normed = norm(x, w.mlp_norm)
  middle = jax.nn.silu(product(normed, w.gate_proj)) * product(
    normed, w.up_proj
  )
  return x + product(middle, w.down_proj), ((k, v), last)


def _with_bias(y, bias):
  if bias is None:
    return y
  return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def _rotated(x, angles):
  """x (B, T, H, K) by angles (B, T, 1, K / 2), halves paired."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  both = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(both, axis=-1).astype(x.dtype)


def product(x: jax.Array, w) -> jax.Array:
  """x (..., D) by w (D, F) in any format: (..., F) in the dtype of x."""
  rows = math.prod(x.shape[:-1])
  if is_quantized(w) or rows > FEW_ROWS or not sums_are_fused():
    return quantized_matmul(x, w)
  depth, width = w.shape
  parts = _splits(depth, width)
  flat = x.astype(jnp.float32).reshape(rows, parts, -1, 1)
  # Rounded as a product of x's dtype would do.
  wide = w.astype(x.dtype).astype(jnp.float32).reshape(parts, -1, width)
  sums = lax.optimization_barrier([jnp.sum(row * wide, axis=1) for row in flat])
  if parts > 1:
    halves = [*(one[: parts // 2] for one in sums)]
    halves += [one[parts // 2 :] for one in sums]
    halves = _reduced(halves, 0)
    sums = [a + b for a, b in zip(halves[:rows], halves[rows:])]
  y = jnp.stack(sums)
  return y.astype(x.dtype).reshape(*x.shape[:-1], width)


def _splits(depth: int, width: int) -> int:
  """Parts of a matrix: a power of two, or 1 where the depth is odd."""
  parts = 2
  while parts * width < _PART:
    parts *= 2
  return math.gcd(parts, depth)


def attend(q, k, v, keys, values, lengths) -> jax.Array:
  """Attention of new tokens to the first `lengths` slots, and to each other.

  Args:
    q: (B, T, H, K).
    k: (B, T, N, K), of the new tokens, as v; arrays or QTensors.
    v: Alike.
    keys: (B, S, N, K), old ones, as values.
    values: Alike.
    lengths: (B,) int32.

  Returns:
    (B, T, H, K) in the dtype of q.
  """
  k, v = as_array(k), as_array(v)
  batch, count, _, size = q.shape
  heads = k.shape[2]
  flat = q.reshape(batch, count, heads, -1, size).astype(jnp.float32)
  # Queries that share keys, (B, N, R, K), tokens first.
  flat = jnp.moveaxis(flat, 1, 2).reshape(batch, heads, -1, size)
  flat = flat * size**-0.5
  few = flat.shape[2] <= FEW_QUERIES and sums_are_fused()
  old = (_sums if few else _products)(flat, keys, values, lengths)
  mixed = _merged(flat, k.astype(jnp.float32), v.astype(jnp.float32), *old)
  mixed = mixed.reshape(batch, heads, count, -1, size)
  return jnp.moveaxis(mixed, 2, 1).reshape(q.shape).astype(q.dtype)


def _chunks(size: int) -> int:
  """Slots of a chunk: the largest divisor of S that is no more than _CHUNK."""
  return max(p for p in range(1, _CHUNK + 1) if size % p == 0)


def _seen(size, lengths):
  """(B, C, P, 1) bool, the slots that are filled."""
  chunk = _chunks(size)
  places = jnp.arange(size, dtype=jnp.int32).reshape(1, -1, chunk, 1)
  return places < lengths[:, None, None, None]


def _sums(q, keys, values, lengths):
  """Attention to old tokens, chunk by chunk, of few queries.

  Returns:
    Maxima of the scores and sums of their exponentials, (R, B, C, N), and for
    each query what these shares take of the values, (B, C, N, K).
  """
  seen = _seen(keys.shape[1], lengths)
  cut = lambda whole: (
    as_array(whole)
    .astype(jnp.float32)
    .reshape(whole.shape[0], *seen.shape[1:3], *whole.shape[2:])
  )
  keys, values = cut(keys), cut(values)
  queries = [q[:, None, None, :, i] for i in range(q.shape[2])]
  scores = jnp.stack(_reduced([one * keys for one in queries], 4))
  scores = jnp.where(seen[None], scores, _UNSEEN)
  scores = lax.optimization_barrier(scores)
  most = jnp.max(scores, axis=3)
  # Kept, since XLA would else fuse the exponentials with all products of a
  # value, arrays as large as the cache, and not these with their sums.
  shares = lax.optimization_barrier(jnp.exp(scores - most[:, :, :, None]))
  mixed = [jnp.sum(share[..., None] * values, axis=2) for share in shares]
  return most, jnp.sum(shares, axis=3), mixed


def _reduced(arrays, axis):
  """The sums of several arrays over an axis, as one reduction."""
  zeros = (jnp.float32(0),) * len(arrays)
  add = lambda a, b: tuple(x + y for x, y in zip(a, b))
  return lax.reduce(tuple(arrays), zeros, add, (axis,))


def _products(q, keys, values, lengths):
  """As `_sums`, by matrix products, with all slots in one chunk."""
  keys, values = as_array(keys), as_array(values)
  seen = _seen(keys.shape[1], lengths).reshape(len(q), 1, 1, -1)
  scores = jnp.einsum(
    "bnrk,bsnk->bnrs", q.astype(keys.dtype), keys,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  scores = jnp.where(seen, scores, _UNSEEN)
  most = jnp.max(scores, axis=-1)
  shares = jnp.exp(scores - most[..., None])
  mixed = jnp.einsum(
    "bnrs,bsnk->rbnk", shares.astype(values.dtype), values,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  one = lambda x: jnp.moveaxis(x, 2, 0)[:, :, None]
  return one(most), one(jnp.sum(shares, axis=-1)), list(mixed[:, :, None])


def _merged(q, k, v, most, total, mixed):
  """Chunks of old tokens and the new ones, merged: (B, N, R, K) float32.

  Args:
    q: (B, N, R, K), tokens first, in equal numbers.
    k: (B, T, N, K).
    v: (B, T, N, K).
    most: See `_sums`, as those behind it.
    total: Alike.
    mixed: Alike.
  """
  count, queries = k.shape[1], q.shape[2]
  tokens = jnp.arange(queries) // (queries // count)
  sees = jnp.arange(count)[None] <= tokens[:, None]
  scores = jnp.einsum("bnrk,btnk->rbnt", q, k, precision=lax.Precision.HIGHEST)
  scores = jnp.where(sees[:, None, None], scores, _UNSEEN)
  top = jnp.maximum(jnp.max(most, axis=2), jnp.max(scores, axis=-1))
  weight = jnp.exp(most - top[:, :, None])
  shares = jnp.exp(scores - top[..., None])
  total = jnp.sum(weight * total, axis=2) + jnp.sum(shares, axis=-1)
  old = _reduced([w[..., None] * m for w, m in zip(weight, mixed)], 1)
  new = jnp.einsum(
    "rbnt,btnk->rbnk", shares, v, precision=lax.Precision.HIGHEST
  )
  found = (jnp.stack(old) + new) / total[..., None]
  return jnp.moveaxis(found, 0, 2)
