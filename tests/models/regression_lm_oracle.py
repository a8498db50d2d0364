"""The Transformer-encoded model as float64 NumPy loops, written on its own."""

import numpy as np


def rms_norm(x, scale, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rotate(x, position, theta):
  """One head (K,) at a position, halves paired."""
  half = len(x) // 2
  angle = position * theta ** (-np.arange(half) / half)
  a, b = x[:half], x[half:]
  return np.concatenate(
    [
      a * np.cos(angle) - b * np.sin(angle),
      b * np.cos(angle) + a * np.sin(angle),
    ]
  )


def attention(q, k, v, visible):
  """q (T, H, K), k and v (L, N, K); `visible(t, l)` says who sees whom."""
  heads, groups = q.shape[1], k.shape[1]
  out = np.zeros_like(q)
  for t in range(len(q)):
    for h in range(heads):
      n = h * groups // heads
      seen = [j for j in range(len(k)) if visible(t, j)]
      scores = np.array([q[t, h] @ k[j, n] for j in seen])
      weights = np.exp((scores - scores.max()) / np.sqrt(q.shape[-1]))
      weights /= weights.sum()
      out[t, h] = sum(w * v[j, n] for w, j in zip(weights, seen))
  return out


def heads(x, kernel, head_dim):
  return (x @ kernel).reshape(len(x), -1, head_dim)


def self_attention(c, p, x, visible):
  q, k, v = (heads(x, p[f"{n}_proj"]["kernel"], c.head_dim) for n in "qkv")
  for y in (q, k):
    for t in range(len(x)):
      for h in range(y.shape[1]):
        y[t, h] = rotate(y[t, h], t, c.rope_theta)
  mixed = attention(q, k, v, visible).reshape(len(x), -1)
  return mixed @ p["o_proj"]["kernel"]


def mlp(p, x):
  gate = x @ p["gate_proj"]["kernel"]
  up = x @ p["up_proj"]["kernel"]
  return (gate / (1 + np.exp(-gate)) * up) @ p["down_proj"]["kernel"]


def norm(c, p, x):
  return rms_norm(x, p["scale"], c.norm_eps)


def layer_of(stacked, index):
  if isinstance(stacked, dict):
    return {name: layer_of(part, index) for name, part in stacked.items()}
  return None if stacked is None else np.asarray(stacked[index], np.float64)


def logits(c, params, text, targets):
  """(T, V) logits of one text (L,) without padding and one row (T,)."""
  f64 = lambda x: np.asarray(x, np.float64)
  x = f64(params["embed"]["table"])[text]
  for index in range(c.encoder_layers):
    p = layer_of(params["encoder"], index)
    x = x + self_attention(
      c, p["attn"], norm(c, p["attn_norm"], x), lambda t, j: True
    )
    x = x + mlp(p["mlp"], norm(c, p["mlp_norm"], x))
  memory = norm(c, layer_of_top(params["encoder_norm"]), x)
  inputs = np.concatenate([[0], targets[:-1]])
  y = f64(params["target_embed"]["table"])[inputs]
  y = y + f64(params["slots"]["table"])[: len(y)]
  for index in range(c.decoder_layers):
    p = layer_of(params["decoder"], index)
    y = y + self_attention(
      c, p["attn"], norm(c, p["attn_norm"], y), lambda t, j: j <= t
    )
    cross = p["cross"]
    normed = norm(c, p["cross_norm"], y)
    q = heads(normed, cross["q_proj"]["kernel"], c.head_dim)
    k, v = (
      heads(memory, cross[f"{n}_proj"]["kernel"], c.head_dim) for n in "kv"
    )
    mixed = attention(q, k, v, lambda t, j: True).reshape(len(y), -1)
    y = y + mixed @ cross["o_proj"]["kernel"]
    y = y + mlp(p["mlp"], norm(c, p["mlp_norm"], y))
  y = norm(c, layer_of_top(params["final_norm"]), y)
  return y @ f64(params["head"]["kernel"])


def layer_of_top(part):
  return {name: np.asarray(value, np.float64) for name, value in part.items()}
