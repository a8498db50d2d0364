"""The specification of `transformer_step`: loops over layers and tokens."""

import numpy as np

from ops.paged_sparse_attention import (
  PageSummary,
  paged_sparse_attention_reference,
)


def transformer_step_reference(
  x, weights, keys, values, lengths, frequencies, *, eps, pages=None
):
  """The equations of `transformer_step` in float64 NumPy, token by token.

  Nothing is quantized here, and summaries of `pages` are not returned.
  """
  exact = lambda v: np.asarray(v, np.float64)
  x, keys, values = exact(x).copy(), exact(keys).copy(), exact(values).copy()
  batch, count, _ = x.shape
  layers, _, slots, heads, size = keys.shape
  arrays = {
    name: stack
    for name, stack in vars(weights).items()
    if name != "taps" and stack is not None
  }
  for i in range(layers):
    w = {name: exact(stack[i]) for name, stack in arrays.items()}
    for b in range(batch):
      # Slots that are dropped are seen by this call's tokens all the same.
      room = np.zeros((count, heads, size))
      k_row = np.concatenate([keys[i, b], room])
      v_row = np.concatenate([values[i, b], room])
      for t in range(count):
        place = int(lengths[b]) + t
        normed = _rmsnorm(x[b, t], eps) * w["attn_norm"]
        q, k, v = (
          (normed @ w[f"{one}_proj"] + w.get(f"{one}_bias", 0)).reshape(
            -1, size
          )
          for one in "qkv"
        )
        if "q_norm" in w:
          q, k = _rmsnorm(q, eps) * w["q_norm"], _rmsnorm(k, eps) * w["k_norm"]
        angles = place * exact(frequencies)
        k_row[place], v_row[place] = _rotated(k, angles), v
        q = _rotated(q, angles).reshape(heads, -1, size)
        if pages is None:
          scores = np.einsum("ngk,snk->ngs", q, k_row[: place + 1]) / size**0.5
          shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
          shares /= shares.sum(axis=-1, keepdims=True)
          mixed = np.einsum("ngs,snk->ngk", shares, v_row[: place + 1])
        else:
          summary = pages.summary
          mixed = paged_sparse_attention_reference(
            q.reshape(1, -1, size), k_row[None, :slots], v_row[None, :slots],
            PageSummary(
              summary.first[i, b][None], summary.second[i, b][None],
              summary.kind,
            ),
            [place + 1], pages.num_pages[i, b][None], max_pages=pages.max_pages,
          )  # fmt: skip
        x[b, t] += mixed.reshape(-1) @ w["o_proj"]
        normed = _rmsnorm(x[b, t], eps) * w["mlp_norm"]
        gate = normed @ w["gate_proj"]
        middle = (
          gate * np.exp(-np.logaddexp(0, -gate)) * (normed @ w["up_proj"])
        )
        x[b, t] += middle @ w["down_proj"]
      keys[i, b], values[i, b] = k_row[:slots], v_row[:slots]
  return x, keys, values


def _rmsnorm(x, eps):
  return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def _rotated(x, angles):
  first, second = np.split(x, 2, axis=-1)
  cos, sin = np.cos(angles), np.sin(angles)
  return np.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
