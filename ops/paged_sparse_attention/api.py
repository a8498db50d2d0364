"""The public `paged_sparse_attention`: checks, resolves, calls."""

import importlib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.paged_sparse_attention.summary import PageSummary

IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.on_one_device(
      dispatch.kernel(
        "ops.paged_sparse_attention.mosaic_gpu", dispatch.needs_wgmma
      )
    ),
    "xla": dispatch.always,
  }
)


# Pages that every row keeps: the first, and that of the last token.
ALWAYS = 2


def paged_sparse_attention(
  q: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  summary: PageSummary,
  lengths: jax.Array,
  num_pages: jax.Array | int,
  *,
  max_pages: int | None = None,
  scale: float | None = None,
  summarize: bool = False,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, PageSummary]:
  """Attends from one token a row to the best pages of its cache, and no other.

  Quest (https://arxiv.org/abs/2406.10774, section 3.3), for each row and key
  head: of the pages that hold a token, the first and the last one are kept, and
  those with the highest scores, until there are `num_pages`:

    score_p = max_g w(q_g) . summary_p          (`summary.weights`)
    out_g = softmax(scale * q_g . keys^T | kept pages) values

  Query heads g = h // (H / N) that share a key head share its pages. Of equal
  scores the earlier page wins. With `num_pages` >= P it is
  `jax.nn.dot_product_attention` with the first `lengths` slots in sight.

  Args:
    q: (B, H, K), bfloat16 or float32.
    keys: (B, S, N, K), the key of q's token among them.
    values: (B, S, N, K). Slots behind a row's last token may hold anything
      finite.
    summary: `page_summary(keys, lengths, ...)`, (B, P, N, K). A page is S / P
      slots. The summary of a row's first page, of its last one and of those
      behind are not read.
    lengths: (B,) int32, slots that are filled. A row with none gives zeros.
    num_pages: Pages to keep, an integer or int32 of (B,) or (B, N), which may
      change from call to call. Less than two counts as two, and more than
      `max_pages` as so many.
    max_pages: Pages that there is room for, at least two; None for P.
    scale: Factor of the logits, K**-0.5 by default.
    summarize: Whether to return `last_page_summary(keys, lengths, ...)`, too,
      for `write_page_summary`: what a cache needs for its next token.
    implementation: `"mosaic_gpu"` (Hopper; bfloat16, heads of 64 or 128, up to
      eight query heads a key head, 64 to 8,192 pages of 8 to 64 slots), which
      compares scores by their first 31 - log2(P) bits; `"xla"`; or None for
      the first that runs.

  Returns:
    (B, H, K) in q's dtype, and with `summarize` a `PageSummary` of one page a
    row, (B, 1, N, K), in the dtype of the keys. Sums are float32. Of the
    summary all pages that hold a token are read. `"xla"` gathers `max_pages`
    pages of keys and values, be fewer kept, and products read these alone; its
    memory is their size. The kernel reads the kept pages once, where they lie,
    and keeps scores of pages and a few sums. Gradients flow through the kept
    tokens, not through the selection; the kernel has those of `"xla"`.

  Raises:
    ValueError: Shapes do not fit each other, or `implementation` does not run.
  """
  pages = _check(q, keys, values, summary, lengths)
  b, n = keys.shape[0], keys.shape[2]
  most = pages if max_pages is None else min(max_pages, pages)
  if most < min(ALWAYS, pages):
    raise ValueError(
      f"paged_sparse_attention: max_pages={max_pages}: {ALWAYS} are always kept"
    )
  wanted = jnp.asarray(num_pages, jnp.int32)
  if wanted.shape not in ((), (b,), (b, n)):
    raise ValueError(
      f"paged_sparse_attention: num_pages is {wanted.shape}, not (), ({b},) or"
      f" ({b}, {n})"
    )
  wanted = wanted.reshape(*wanted.shape, *[1] * (2 - wanted.ndim))
  wanted = jnp.broadcast_to(jnp.maximum(wanted, ALWAYS), (b, n))
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  arrays = q, keys, values, summary, lengths, wanted
  options = {"max_pages": most, "scale": scale, "summarize": summarize}
  name = dispatch.resolve(
    "paged_sparse_attention",
    IMPLEMENTATIONS,
    implementation,
    *arrays,
    **options,
  )
  module = importlib.import_module(f"ops.paged_sparse_attention.{name}")
  return module.forward(*arrays, **options)


def _check(q, keys, values, summary, lengths) -> int:
  """Returns P; raises ValueError unless all shapes fit each other."""
  if q.ndim != 3 or keys.ndim != 4:
    raise ValueError(
      f"paged_sparse_attention: q {q.shape} and keys {keys.shape} are not"
      " (B, H, K) and (B, S, N, K)"
    )
  b, h, k = q.shape
  s, n = keys.shape[1:3]
  pages = summary.first.shape[1] if summary.first.ndim == 4 else 0
  wanted = {
    "keys": (b, s, n, k),
    "values": (b, s, n, k),
    "summary.first": (b, pages, n, k),
    "summary.second": (b, pages, n, k),
    "lengths": (b,),
  }
  found = {
    "keys": keys,
    "values": values,
    "summary.first": summary.first,
    "summary.second": summary.second,
    "lengths": lengths,
  }
  for name, shape in wanted.items():
    if found[name].shape != shape:
      raise ValueError(
        f"paged_sparse_attention: {name} is {found[name].shape}, but q"
        f" {q.shape} and keys {keys.shape} need {shape}"
      )
  if h % n:
    raise ValueError(
      f"paged_sparse_attention: {h} query heads for {n} key heads"
    )
  if not pages or s % pages:
    raise ValueError(
      f"paged_sparse_attention: {s} slots are no {pages} pages of equal size"
    )
  return pages
