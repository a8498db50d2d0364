"""What is kept of a page of keys, so that it is scored without being read.

Shapes by axis letter: B rows, S slots, P pages, N key heads, K channels, G
query heads of a key head.
"""

import dataclasses

import jax
import jax.numpy as jnp

# Minima and maxima of a page's keys, or means and standard deviations.
KINDS = ("bounds", "moments")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageSummary:
  """Two numbers of each channel of each page's keys.

  Attributes:
    first: Minimum ("bounds") or mean ("moments"), (B, P, N, K).
    second: Maximum or standard deviation, (B, P, N, K).
    kind: Of `KINDS`.
  """

  first: jax.Array
  second: jax.Array
  kind: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptPages:
  """What a decoding step has to know to read some pages of its caches alone.

  Attributes:
    summary: Of L layers, (L, B, P, N, K), of the slots that are filled.
    num_pages: (L, B, N) int32, pages to keep, as in `paged_sparse_attention`.
    max_pages: Pages that there is room for, at least two.
  """

  summary: PageSummary
  num_pages: jax.Array
  max_pages: int = dataclasses.field(metadata={"static": True})


def page_summary(
  keys: jax.Array, lengths: jax.Array, *, page_size: int, kind: str = "bounds"
) -> PageSummary:
  """Summarizes the filled slots of every page.

  "bounds" are those of Quest (https://arxiv.org/abs/2406.10774). "moments"
  (https://arxiv.org/abs/2605.27740) take as many bytes, and one extreme key
  does not widen them as much.

  Args:
    keys: (B, S, N, K), S a multiple of `page_size`.
    lengths: (B,) int32, slots that are filled.
    page_size: Slots of a page.
    kind: "bounds" or "moments".

  Returns:
    The summary in the dtype of the keys, with sums in float32. It is zero where
    no slot of a page is filled.

  Raises:
    ValueError: Slots do not fill pages, or there is no such kind.
  """
  b, s, n, k = keys.shape
  if s % page_size:
    raise ValueError(
      f"page_summary: {s} slots do not fill pages of {page_size}"
    )
  seen = jnp.arange(s, dtype=jnp.int32)[None] < lengths[:, None]
  paged = keys.reshape(b, -1, page_size, n, k)
  return _summary(paged, seen.reshape(b, -1, page_size), kind)


def update_page_summary(
  summary: PageSummary, keys: jax.Array, lengths: jax.Array
) -> PageSummary:
  """Summarizes the page of each row's last token anew.

  All of the page is read, which is a 2 P-th of a dense step's bytes. So nothing
  of an earlier token has to be kept, rounding does not add up over the tokens
  of a page, and a row that takes tokens back needs no other function.

  Args:
    summary: Of the pages in front. It is written in place where it is donated.
    keys: (B, S, N, K), with the key of the last token.
    lengths: (B,) int32, slots that are filled. A row with none stays as it is.

  Returns:
    What `page_summary` gives, but that pages behind the last token are as they
    were.
  """
  size = keys.shape[1] // summary.first.shape[1]
  last = last_page_summary(keys, lengths, page_size=size, kind=summary.kind)
  return write_page_summary(summary, last, lengths, page_size=size)


def last_page_summary(
  keys: jax.Array, lengths: jax.Array, *, page_size: int, kind: str = "bounds"
) -> PageSummary:
  """Summarizes the page of each row's last token, and reads no other.

  Args:
    keys: (B, S, N, K), S a multiple of `page_size`.
    lengths: (B,) int32, slots that are filled.
    page_size: Slots of a page.
    kind: "bounds" or "moments".

  Returns:
    A summary of one page a row, (B, 1, N, K), zero where a row has no token.
  """
  page = jnp.maximum(lengths - 1, 0) // page_size
  slots = jnp.arange(page_size, dtype=jnp.int32)[None]
  slots = page[:, None] * page_size + slots
  rows = jnp.arange(len(keys))
  own = keys.at[rows[:, None], slots].get(mode="promise_in_bounds")
  return _summary(own[:, None], (slots < lengths[:, None])[:, None], kind)


def write_page_summary(
  summary: PageSummary,
  last: PageSummary,
  lengths: jax.Array,
  *,
  page_size: int,
) -> PageSummary:
  """Writes what `last_page_summary` gives to the pages that it is of.

  Args:
    summary: Of all pages. It is written in place where it is donated.
    last: (B, 1, N, K).
    lengths: (B,) int32, slots that are filled. A row with none stays as it is.
    page_size: Slots of a page.
  """
  rows, pages = jnp.arange(len(lengths)), summary.first.shape[1]
  to = jnp.where(lengths > 0, (lengths - 1) // page_size, pages)
  return jax.tree.map(
    lambda old, one: old.at[rows, to].set(one[:, 0], mode="drop"), summary, last
  )


def _summary(paged, seen, kind):
  """Of pages (B, P, page, N, K) and their filled slots (B, P, page)."""
  seen = seen[..., None, None]
  some = jnp.any(seen, axis=2)
  if kind == "bounds":
    first = jnp.min(jnp.where(seen, paged, jnp.inf), axis=2)
    second = jnp.max(jnp.where(seen, paged, -jnp.inf), axis=2)
  elif kind == "moments":
    count = jnp.maximum(jnp.sum(seen, axis=2, dtype=jnp.float32), 1)
    wide = jnp.where(seen, paged.astype(jnp.float32), 0)
    first = jnp.sum(wide, axis=2) / count
    far = jnp.where(seen, wide - first[:, :, None], 0)
    second = jnp.sqrt(jnp.sum(jnp.square(far), axis=2) / count)
  else:
    raise ValueError(
      f"page_summary: kind={kind}: take one of {', '.join(KINDS)}"
    )
  clean = lambda x: jnp.where(some, x, 0).astype(paged.dtype)
  return PageSummary(clean(first), clean(second), kind)


def weights(q: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
  """What both parts of a summary are multiplied by, (..., K) as q.

  A page's score is the sum of both products: Quest's bound,

    sum_d max(q_d min_d, q_d max_d) = max(q, 0) . max + min(q, 0) . min,

  or q . mean + |q| . deviation: the bound with the range's middle and half in
  the place of the moments, since max(q a, q b) = q (a+b)/2 + |q| (b-a)/2.
  """
  if kind == "bounds":
    return jnp.minimum(q, 0), jnp.maximum(q, 0)
  return q, jnp.maximum(q, -q)


def page_logits(q: jax.Array, summary: PageSummary) -> jax.Array:
  """Scores of all pages, (B, N, P) float32: the most of the heads' that share.

  A sum, and no matrix product: XLA would transpose the summaries for it.

  Args:
    q: (B, N, G, K).
    summary: Of N key heads.
  """
  wide = lambda x: x.astype(jnp.float32)
  first, second = (
    wide(weight)[:, None] * wide(part)[:, :, :, None]
    for weight, part in zip(
      weights(q, summary.kind), (summary.first, summary.second)
    )
  )
  return jnp.moveaxis(jnp.max(jnp.sum(first + second, axis=-1), axis=-1), 1, 2)
