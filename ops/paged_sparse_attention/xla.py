"""`paged_sparse_attention` in plain JAX: kept pages are gathered, then read.

Shapes by axis letter: B rows, S slots, P pages, C slots of a page, M pages that
there is room for, N key heads, G query heads of a key head, K channels.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ops.paged_sparse_attention.summary import last_page_summary, page_logits

# Finite, so that rows that see nothing are no NaN.
_UNSEEN = -1e30


def forward(
  q, keys, values, summary, lengths, num_pages,
  *, max_pages, scale, summarize=False,
):  # fmt: skip
  """Implements `paged_sparse_attention`; num_pages is (B, N), at least 2."""
  b, s, n, k = keys.shape
  pages = summary.first.shape[1]
  own = q.reshape(b, n, -1, k)
  kept = kept_pages(
    own, summary, lengths, num_pages, max_pages=max_pages, page_size=s // pages
  )
  rows, heads = jnp.arange(b)[:, None, None], jnp.arange(n)[None, :, None]

  def gathered(cache):
    paged = cache.reshape(b, pages, s // pages, n, k)
    # In the place of a page that is not there the first one is read again.
    there = jnp.where(kept < pages, kept, 0)
    found = paged.at[rows, there, :, heads].get(mode="promise_in_bounds")
    return found.reshape(b, n, -1, k)

  page = jnp.arange(s // pages, dtype=jnp.int32)
  slots = kept[..., None] * (s // pages) + page[None, None, None]
  seen = (slots < lengths[:, None, None, None]).reshape(b, n, 1, -1)
  scores = jnp.einsum(
    "bngk,bnsk->bngs", own, gathered(keys), preferred_element_type=jnp.float32
  )
  scores = jnp.where(seen, scores * scale, _UNSEEN)
  shares = jax.nn.softmax(scores, axis=-1)
  shares = jnp.where(seen, shares, 0).astype(values.dtype)
  mixed = jnp.einsum(
    "bngs,bnsk->bngk", shares, gathered(values),
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  mixed = mixed.reshape(q.shape).astype(q.dtype)
  if not summarize:
    return mixed
  last = last_page_summary(
    keys, lengths, page_size=s // pages, kind=summary.kind
  )
  return mixed, last


def kept_pages(
  q, summary, lengths, num_pages, *, max_pages, page_size
) -> jax.Array:
  """Returns the pages that are kept, (B, N, M) int32 in rising order, then P.

  Args:
    q: (B, N, G, K).
    summary: Of the pages.
    lengths: (B,) int32.
    num_pages: (B, N) int32, at least 2.
    max_pages: M.
    page_size: C.
  """
  scores = lax.stop_gradient(page_logits(q, summary))
  pages = scores.shape[-1]
  page = jnp.arange(pages, dtype=jnp.int32)[None, None]
  last = ((lengths - 1) // page_size)[:, None, None]
  scores = jnp.where((page == 0) | (page == last), jnp.inf, scores)
  scores = jnp.where(page <= last, scores, -jnp.inf)
  # Of equal scores that of the lower page is first.
  _, best = lax.top_k(scores, max_pages)
  count = jnp.minimum(num_pages[..., None], last + 1)
  kept = jnp.arange(max_pages, dtype=jnp.int32)[None, None] < count
  return jnp.sort(jnp.where(kept, best, pages), axis=-1)
