"""Attention of many rollouts over one shared prefix, by selected pages."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import dispatch
from ops.ceil_share import ceil_share
from ops.select_pages import (
  page_bounds,
  page_scores,
  select_pages,
  select_pages_reference,
)

IMPLEMENTATIONS = dispatch.XLA_ONLY


def sparse_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  suffix_k: jax.Array,
  suffix_v: jax.Array,
  keep: jax.Array | None,
  *,
  prefix_lengths: jax.Array,
  query_start: jax.Array | int,
  page_size: int,
  bounds: tuple[jax.Array, jax.Array] | None = None,
  keep_sink_and_current: bool = False,
  shared: bool = False,
  behind: jax.Array | int | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attends to the best pages of a shared prefix and of an own suffix.

  Quest (https://arxiv.org/abs/2406.10774, section 3.3), for each query head and
  query: a share `keep` of the K visible tokens, the query's own included, is a
  budget of ceil(ceil(keep * K) / page_size) pages. The pages with the highest
  upper bound of the logit (`page_scores`) are kept, ties included, and one
  softmax runs over all their visible tokens:

    out = softmax(scale * q . [k, suffix_k]^T | kept and visible) [v, suffix_v]

  R rollouts share row b's prefix, which is never repeated: rollouts, queries
  and the query heads of a group are the rows of one matrix product. The prefix
  is aligned to pages, so suffix pages are groups of slots from slot 0. Bounds
  of the query's own page cover only slots that it sees, so one call with T
  queries equals T calls with one.

  With `keep=None` it is `jax.nn.dot_product_attention` of q with the prefix and
  the suffix joined, under the same visibility.

  Args:
    q: Queries of consecutive tokens, (B, R, T, H, D), bfloat16 or float32.
    k: Prefix keys, (B, S, N, D), S a multiple of `page_size`; query head h
      reads key head h // (H / N).
    v: Prefix values, (B, S, N, D).
    suffix_k: Keys of each rollout's own tokens, (B, R, C, N, D), any C; slots
      after a query may hold anything finite.
    suffix_v: Values of each rollout's own tokens, (B, R, C, N, D).
    keep: Share of the visible tokens, (B, R, T), in (0, 1]; 1 is exactly dense.
      None means dense.
    prefix_lengths: Prefix tokens that a rollout sees, (B, R), int32, multiples
      of `page_size`.
    query_start: Suffix slot of the first query, an int or an int32 scalar.
    page_size: Tokens a page.
    bounds: `page_bounds(k, page_size=page_size)`, to compute it only once for
      many calls.
    keep_sink_and_current: Always keep the first page and the query's own. They
      use up the budget. The first is out where no token of it is visible.
    shared: Query heads that share a key head share its pages, too, which are
      those with the highest bound of any of them, as `paged_sparse_attention`
      has it: then a page is read for all heads of a group or for none.
    behind: Visible are at most so many tokens in front of the query's own, an
      int or an int32 scalar; None for all. K then counts the tokens from the
      first page on of which one is visible, so that a share of 1 is dense here
      too, and bounds of that page are those of all its keys.
    scale: Factor of the logits, D**-0.5 by default.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    (B, R, T, H, D) in q's dtype. Logits and sums are float32; memory is
    B * H * R * T * (S + C) float32. Gradients flow through the kept tokens,
    not through the selection.

  Raises:
    ValueError: Shapes do not fit each other or `page_size`.
  """
  _check_shapes(q, k, v, suffix_k, suffix_v, keep, prefix_lengths, page_size)
  dispatch.resolve("sparse_attention", IMPLEMENTATIONS, implementation)
  slots = query_start + jnp.arange(q.shape[2], dtype=jnp.int32)
  mask_prefix, mask_suffix = _visible(
    prefix_lengths, slots, k.shape[1], suffix_k.shape[2], behind
  )
  if keep is not None:
    if bounds is None:
      bounds = page_bounds(k, page_size=page_size)
    pages = _kept_pages(
      *lax.stop_gradient((q, bounds, suffix_k)),
      keep,
      prefix_lengths,
      slots,
      page_size,
      keep_sink_and_current,
      shared,
      behind,
    )
    tokens = jnp.repeat(pages, page_size, axis=-1)
    mask_prefix = mask_prefix & tokens[..., : k.shape[1]]
    suffix_end = k.shape[1] + suffix_k.shape[2]
    mask_suffix = mask_suffix & tokens[..., k.shape[1] : suffix_end]
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  return _attend(q, k, v, suffix_k, suffix_v, mask_prefix, mask_suffix, scale)


def _check_shapes(q, k, v, suffix_k, suffix_v, keep, prefix_lengths, page_size):
  b, r, t, h, d = q.shape
  s, n = k.shape[1:3]
  c = suffix_k.shape[2]
  expected = {
    "k": (k.shape, (b, s, n, d)),
    "v": (v.shape, (b, s, n, d)),
    "suffix_k": (suffix_k.shape, (b, r, c, n, d)),
    "suffix_v": (suffix_v.shape, (b, r, c, n, d)),
    "prefix_lengths": (prefix_lengths.shape, (b, r)),
  }
  if keep is not None:
    expected["keep"] = (keep.shape, (b, r, t))
  for name, (found, wanted) in expected.items():
    if found != wanted:
      raise ValueError(
        f"sparse_attention: {name} is {found}, but q {q.shape} needs {wanted}"
      )
  if h % n:
    raise ValueError(f"sparse_attention: {h} query heads for {n} key heads")
  if s % page_size:
    raise ValueError(
      f"sparse_attention: {s} prefix slots do not fill pages of {page_size}"
    )


def _visible(prefix_lengths, slots, prefix_size, suffix_size, behind):
  """Returns visibility, (B, 1, R, T or 1, 1, S) and (1, 1, 1, T, 1, C)."""
  prefix = jnp.arange(prefix_size)[None, None] < prefix_lengths[:, :, None]
  suffix = jnp.arange(suffix_size)[None, :] <= slots[:, None]
  prefix, suffix = prefix[:, None, :, None, None], suffix[:, None]
  if behind is not None:
    least = prefix_lengths[:, :, None] + slots[None, None] - behind
    near = jnp.arange(prefix_size)[None, None, None] >= least[..., None]
    prefix = prefix & near[:, None, :, :, None]
    near = jnp.arange(suffix_size)[None] >= slots[:, None] - behind
    suffix = suffix & near[:, None]
  return prefix, suffix[None, None, None]


def _kept_pages(
  q, bounds, suffix_k, keep, prefix_lengths, slots, page_size, forced, shared,
  behind,
):  # fmt: skip
  """Returns the kept pages of prefix and suffix, (B, N, R, T, G or 1, P)."""
  b, r, t, h, d = q.shape
  kv_heads = suffix_k.shape[3]
  prefix_scores = page_scores(q.reshape(b, r * t, h, d), *bounds)
  prefix_scores = prefix_scores.reshape(b, r, t, h, -1)
  suffix_scores = _suffix_scores(q, suffix_k, slots, page_size)
  scores = jnp.concatenate([prefix_scores, suffix_scores], axis=-1)
  scores = scores.reshape(b, r, t, kv_heads, h // kv_heads, -1)
  scores = scores.transpose(0, 3, 1, 2, 4, 5)
  if shared:
    scores = jnp.max(scores, axis=4, keepdims=True)

  total = prefix_lengths[:, :, None] + slots[None, None] + 1
  if behind is not None:
    unseen = jnp.maximum(total - 1 - behind, 0)
    total = total - unseen // page_size * page_size
  budget = jnp.maximum(ceil_share(keep, total), 1)
  num_pages = (budget + page_size - 1) // page_size

  prefix_page = jnp.arange(prefix_scores.shape[-1])[None, None, None]
  suffix_page = jnp.arange(suffix_scores.shape[-1])[None, None, None]
  lengths = prefix_lengths[:, :, None, None]
  own_page = (slots // page_size)[None, None, :, None]
  no_prefix = lengths == 0

  def joined(prefix, suffix):
    shape = (b, r, t)
    prefix = jnp.broadcast_to(prefix, (*shape, prefix_page.size))
    suffix = jnp.broadcast_to(suffix, (*shape, suffix_page.size))
    both = jnp.concatenate([prefix, suffix], axis=-1)
    return both[:, None, :, :, None]

  in_prefix = prefix_page * page_size < lengths
  in_suffix = suffix_page <= own_page
  if behind is not None:
    # A page is out once its last token is.
    least = (slots - behind)[None, None, :, None]
    last = lambda page: (page + 1) * page_size - 1
    in_prefix = in_prefix & (last(prefix_page) >= lengths + least)
    in_suffix = in_suffix & (last(suffix_page) >= least)
  valid = joined(in_prefix, in_suffix)
  always = None
  if forced:
    always = valid & joined(
      (prefix_page == 0) & ~no_prefix,
      (suffix_page == own_page) | ((suffix_page == 0) & no_prefix),
    )
  return select_pages(
    scores, num_pages[:, None, :, :, None], valid=valid, always=always
  )


def _suffix_scores(q, suffix_k, slots, page_size):
  """Scores the suffix pages, (B, R, T, H, pages), by what each query sees."""
  b, r, t, h, d = q.shape
  c, n = suffix_k.shape[2:4]
  padding = [(0, 0), (0, 0), (0, -c % page_size), (0, 0), (0, 0)]
  # Padding lies after every query, so no page that holds it counts as full.
  padded = jnp.pad(suffix_k, padding)
  paged = padded.reshape(b, r, -1, page_size, n, d)
  if t == 1:
    # A decode step needs no running bounds: far fewer kernels.
    slot = jnp.arange(padded.shape[2]).reshape(-1, page_size)
    seen = (slot <= slots[0])[None, None, :, :, None, None]
    low = jnp.min(jnp.where(seen, paged, jnp.inf), axis=3)
    high = jnp.max(jnp.where(seen, paged, -jnp.inf), axis=3)
    # Pages ahead of the query are never valid; their bounds must be finite.
    started = (slot[:, 0] <= slots[0])[None, None, :, None, None]
    return page_scores(
      q, jnp.where(started, low, 0), jnp.where(started, high, 0)
    )
  running = [
    function(paged, axis=3).reshape(padded.shape)
    for function in (lax.cummin, lax.cummax)
  ]
  full = page_scores(q, *(x[:, :, page_size - 1 :: page_size] for x in running))

  seen_min, seen_max = (
    lax.dynamic_slice_in_dim(x, slots[0], t, axis=2) for x in running
  )
  grouped = q.reshape(b, r, t, n, h // n, d).astype(jnp.float32)
  own = jnp.sum(
    jnp.maximum(
      grouped * seen_min[:, :, :, :, None].astype(jnp.float32),
      grouped * seen_max[:, :, :, :, None].astype(jnp.float32),
    ),
    axis=-1,
  ).reshape(b, r, t, h, 1)
  is_own = jnp.arange(full.shape[-1])[None] == (slots // page_size)[:, None]
  return jnp.where(is_own[None, None, :, None], own, full)


def _attend(q, k, v, suffix_k, suffix_v, mask_prefix, mask_suffix, scale):
  b, r, t, h, d = q.shape
  n = k.shape[2]
  g = h // n
  rows = q.reshape(b, r, t, n, g, d).transpose(0, 3, 1, 2, 4, 5)
  prefix = jnp.einsum(
    "bnxd,bsnd->bnxs",
    rows.reshape(b, n, r * t * g, d),
    k,
    preferred_element_type=jnp.float32,
  ).reshape(b, n, r, t, g, -1)
  suffix = jnp.einsum(
    "bnrtgd,brcnd->bnrtgc",
    rows,
    suffix_k,
    preferred_element_type=jnp.float32,
  )
  prefix = jnp.where(mask_prefix, prefix * scale, -jnp.inf)
  suffix = jnp.where(mask_suffix, suffix * scale, -jnp.inf)
  # Every query keeps at least one page with a visible token, so the maximum is
  # finite. It cancels in the quotient and needs no gradient.
  largest = lax.stop_gradient(
    jnp.maximum(
      jnp.max(prefix, axis=-1, keepdims=True, initial=-jnp.inf),
      jnp.max(suffix, axis=-1, keepdims=True),
    )
  )
  prefix = jnp.exp(prefix - largest)
  suffix = jnp.exp(suffix - largest)
  total = jnp.sum(prefix, axis=-1) + jnp.sum(suffix, axis=-1)
  out = jnp.einsum(
    "bnxs,bsnd->bnxd",
    prefix.reshape(b, n, r * t * g, -1).astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  ).reshape(b, n, r, t, g, d)
  out = out + jnp.einsum(
    "bnrtgc,brcnd->bnrtgd",
    suffix.astype(v.dtype),
    suffix_v,
    preferred_element_type=jnp.float32,
  )
  out = (out / total[..., None]).transpose(0, 2, 3, 1, 4, 5)
  return out.reshape(b, r, t, h, d).astype(q.dtype)


def sparse_attention_reference(
  q,
  k,
  v,
  suffix_k,
  suffix_v,
  keep,
  *,
  prefix_lengths,
  query_start,
  page_size,
  keep_sink_and_current=False,
  shared=False,
  behind=None,
  scale=None,
):
  """The specification in float64, one query head at a time."""
  q, k, v, suffix_k, suffix_v = (
    np.asarray(x, np.float64) for x in (q, k, v, suffix_k, suffix_v)
  )
  group = q.shape[3] // k.shape[2]
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  out = np.zeros_like(q)
  for b, r, t, h in np.ndindex(*q.shape[:4]):
    n, seen = h // group, query_start + t + 1
    length = prefix_lengths[b, r]
    keys = np.concatenate([k[b, :length, n], suffix_k[b, r, :seen, n]])
    values = np.concatenate([v[b, :length, n], suffix_v[b, r, :seen, n]])
    query = q[b, r, t, h]
    starts = range(0, len(keys), page_size)
    share = 1.0 if keep is None else float(keep[b, r, t])
    least = 0 if behind is None else max(len(keys) - 1 - behind, 0)
    total = len(keys) - least // page_size * page_size
    budget = max(int(np.ceil(share * total - 1e-3)), 1)
    choosing = q[b, r, t, n * group : (n + 1) * group] if shared else [query]
    scores = []
    for start in starts:
      page = keys[start : start + page_size]
      ends = page.min(0), page.max(0)
      bounds = [np.maximum(*(one * end for end in ends)) for one in choosing]
      scores.append(max(bound.sum() for bound in bounds))
    valid = np.array([start + page_size > least for start in starts])
    always = np.zeros(len(scores), bool)
    if keep_sink_and_current:
      always[[0, -1]] = valid[[0, -1]]
    kept = select_pages_reference(
      np.array(scores),
      np.array(-(-budget // page_size)),
      valid=valid,
      always=always,
    )
    kept = np.repeat(kept, page_size)[: len(keys)]
    kept &= np.arange(len(keys)) >= least
    logits = np.where(kept, scale * (keys @ query), -np.inf)
    weights = np.exp(logits - logits.max())
    out[b, r, t, h] = weights @ values / weights.sum()
  return out
