"""The specification of `paged_sparse_attention`: one key head at a time."""

import numpy as np


def paged_sparse_attention_reference(
  q, keys, values, summary, lengths, num_pages, *, max_pages=None, scale=None
) -> np.ndarray:
  """The equations of `paged_sparse_attention` in float64 NumPy."""
  exact = lambda x: np.asarray(x, np.float64)
  q, keys, values = exact(q), exact(keys), exact(values)
  first, second = exact(summary.first), exact(summary.second)
  batch, heads, size = q.shape
  slots, kv_heads = keys.shape[1:3]
  pages, group = first.shape[1], heads // kv_heads
  page_size = slots // pages
  scale = size**-0.5 if scale is None else scale
  num_pages = np.asarray(num_pages)
  num_pages = num_pages.reshape(*num_pages.shape, *[1] * (2 - num_pages.ndim))
  num_pages = np.broadcast_to(num_pages, (batch, kv_heads))
  out = np.zeros_like(q)
  for b, n in np.ndindex(batch, kv_heads):
    length = int(lengths[b])
    if length == 0:
      continue
    last = (length - 1) // page_size
    own = q[b, n * group : (n + 1) * group]
    score = [
      max(
        _score(one, first[b, p, n], second[b, p, n], summary.kind)
        for one in own
      )
      for p in range(last + 1)
    ]
    kept = {0, last}
    budget = min(max(num_pages[b, n], 2), max_pages or pages)
    others = sorted(range(1, last), key=lambda p: (-score[p], p))
    kept |= set(others[: budget - len(kept)])
    seen = [s for s in range(length) if s // page_size in kept]
    logits = scale * own @ keys[b, seen, n].T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    out[b, n * group : (n + 1) * group] = shares @ values[b, seen, n]
  return out


def _score(q, first, second, kind):
  if kind == "bounds":
    return np.sum(np.maximum(q * first, q * second))
  return np.sum(q * first + np.abs(q) * second)
