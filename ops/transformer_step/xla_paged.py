"""Attention of a new token to the best pages of a layer, in plain JAX.

Shapes by axis letter: B rows, S slots, P pages, C slots of a page, M pages that
there is room for, N key heads, G query heads of a key head, K channels.
"""

import jax
import jax.numpy as jnp

from ops.paged_sparse_attention.summary import PageSummary, last_page_summary
from ops.paged_sparse_attention.xla import kept_pages

# Finite, so that padding is no NaN.
_UNSEEN = -1e30


def attend(
  q, k, v, keys, values, pages, lengths
) -> tuple[jax.Array, PageSummary]:
  """Attends to the pages that are kept, the new token's among them.

  Args:
    q: (B, 1, H, K).
    k: (B, 1, N, K), of the new token, as v.
    v: Alike.
    keys: (B, S, N, K), old ones, as values.
    values: Alike.
    pages: `KeptPages` of this layer, without axis L.
    lengths: (B,) int32, slots that are filled.

  Returns:
    (B, 1, H, K) in the dtype of q, and the summary of the new token's page,
    (B, 1, N, K).
  """
  b, s, n, size = keys.shape
  count = pages.summary.first.shape[1]
  c, own = s // count, q.reshape(b, n, -1, size)
  kept = kept_pages(
    own, pages.summary, lengths + 1, jnp.maximum(pages.num_pages, 2),
    max_pages=min(pages.max_pages, count), page_size=c,
  )  # fmt: skip
  rows, heads = jnp.arange(b)[:, None, None], jnp.arange(n)[None, :, None]
  there = jnp.where(kept < count, kept, 0)

  def gathered(cache):
    paged = cache.reshape(b, count, c, n, size)
    found = paged.at[rows, there, :, heads].get(mode="promise_in_bounds")
    return found.reshape(b, n, -1, size)

  product = lambda how, *arrays: jnp.einsum(
    how, *arrays, preferred_element_type=jnp.float32
  )
  slots = kept[..., None] * c + jnp.arange(c, dtype=jnp.int32)[None, None, None]
  seen = (slots < lengths[:, None, None, None]).reshape(b, n, 1, -1)
  scores = product("bngk,bnsk->bngs", own, gathered(keys))
  scores = jnp.where(seen, scores, _UNSEEN)
  newest = product("bngk,bnk->bng", own, k[:, 0])[..., None]
  scores = jnp.concatenate([scores, newest], axis=-1) * size**-0.5
  shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  mixed = product("bngs,bnsk->bngk", shares[..., :-1], gathered(values))
  mixed += shares[..., -1:] * v[:, 0, :, None].astype(jnp.float32)
  return mixed.reshape(q.shape).astype(q.dtype), _summary(
    k, keys, pages.summary.kind, lengths, c
  )


def _summary(k, keys, kind, lengths, page_size):
  """Of the new token's page, with its key k (B, 1, N, K) not yet in `keys`."""
  places = jnp.arange(page_size, dtype=jnp.int32)[None]
  first = jnp.minimum(lengths, keys.shape[1] - 1) // page_size * page_size
  slots = first[:, None] + places
  rows = jnp.arange(len(keys))[:, None]
  page = keys.at[rows, slots].get(mode="promise_in_bounds")
  page = jnp.where((slots == lengths[:, None])[..., None, None], k, page)
  filled = jnp.minimum(lengths + 1 - first, page_size)
  return last_page_summary(page, filled, page_size=page_size, kind=kind)
