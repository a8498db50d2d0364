"""`chunked_attention` and its step in float64, one query at a time."""

import functools

import numpy as np


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
  top=None,
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
    others = q[b, t, n * group : (n + 1) * group].sum(axis=0) * scale
    found = []
    for m, end in enumerate(np.asarray(ends[b]).tolist()):
      seen = end + window + 1 if seen_from is None else int(seen_from[b, m])
      if seen > t or end < start:
        continue
      key = k[b, end, n] if chunk_k is None else wide(chunk_k[b, m, n])
      value = v[b, end, n] if chunk_v is None else wide(chunk_v[b, m, n])
      found.append((float(others @ key), key, value))
    if top is not None and len(found) > top:
      last = sorted(score for score, *_ in found)[-top]
      found = [chunk for chunk in found if chunk[0] >= last]
    keys += [key for _, key, _ in found]
    values += [value for *_, value in found]
    logits = scale * (np.stack(keys) @ q[b, t, h])
    shares = np.exp(logits - logits.max())
    out[b, t, h] = shares @ np.stack(values) / shares.sum()
  return out


def chunked_attention_step_reference(
  q, k, v, chunk_k, chunk_v, ring_k, ring_v, layer, chunks, near, *, scale=None
):
  """The same of `chunked_attention_step`."""
  wide = functools.partial(np.asarray, dtype=np.float64)
  q, k, v = wide(q), wide(k), wide(v)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  group = q.shape[1] // k.shape[1]
  out = np.zeros_like(q)
  for b, h in np.ndindex(*q.shape[:2]):
    n, far, close = h // group, int(chunks[b]), int(near[b])

    def seen(of_chunks, of_ring, itself, b=b, n=n, far=far, close=close):
      parts = of_chunks[layer][b, :far, n], of_ring[layer][b, :close, n]
      return np.concatenate([*map(wide, parts), itself[b, n][None]])

    logits = scale * (seen(chunk_k, ring_k, k) @ q[b, h])
    shares = np.exp(logits - logits.max())
    out[b, h] = shares @ seen(chunk_v, ring_v, v) / shares.sum()
  return out
