"""`chunked_attention_step`: one token a row, from a cache of chunks and a ring.

Caches are those of all layers, so that a kernel reads them where they lie.
"""

import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from ops import dispatch

IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.on_one_device(
      dispatch.kernel(
        "ops.chunked_attention.mosaic_gpu_step", dispatch.needs_wgmma
      )
    ),
    "xla": dispatch.always,
  }
)


def chunked_attention_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  chunk_k: jax.Array,
  chunk_v: jax.Array,
  ring_k: jax.Array,
  ring_v: jax.Array,
  layer: jax.Array | int,
  chunks: jax.Array,
  near: jax.Array,
  *,
  scale: float | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attends from one token a row to chunks, to the last tokens and to itself.

  `chunked_attention` (https://arxiv.org/abs/2411.17685, equation 8) for
  decoding, of a layer l of caches:

    out = softmax(scale * q . [chunk_k_{l,:chunks}, ring_k_{l,:near}, k]) .
          [chunk_v_{l,:chunks}, ring_v_{l,:near}, v]

  Query head h reads key head h // (H / N). The equivalent plain JAX is
  `jax.nn.dot_product_attention` to the three, one behind the other, with a
  mask.

  Args:
    q: (B, H, K), bfloat16 or float32.
    k: Key of the token, (B, N, K).
    v: Its value, (B, N, K).
    chunk_k: Keys of chunks of all layers, (L, B, M, N, K).
    chunk_v: (L, B, M, N, K); `chunk_k` where keys are values too.
    ring_k: Keys of the last tokens in any order, (L, B, R, N, K).
    ring_v: (L, B, R, N, K).
    layer: l, an int32 scalar.
    chunks: (B,) int32, chunks in sight, which come first in their rows. What
      lies behind them may be anything finite.
    near: (B,) int32, tokens of the ring, alike.
    scale: Factor of the logits, K**-0.5 by default.
    implementation: `"mosaic_gpu"` (Hopper; bfloat16, heads of 64 or 128, up to
      eight query heads a key head), `"xla"`, or None for the first that runs.

  Returns:
    (B, H, K) in q's dtype. Logits and sums are float32. The kernel reads what
    is in sight once and keeps a few sums; `"xla"` may copy the layer, reads all
    of it, and keeps B H (M + R) logits. Only `"xla"` has gradients.

  Raises:
    ValueError: Shapes do not fit each other, or `implementation` does not run.
  """
  arrays = q, k, v, chunk_k, chunk_v, ring_k, ring_v
  _check(*arrays, chunks, near)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  layer = jnp.asarray(layer, jnp.int32)
  name = dispatch.resolve(
    "chunked_attention_step", IMPLEMENTATIONS, implementation, *arrays
  )
  if name == "xla":
    return _xla(*arrays, layer, chunks, near, scale=scale)
  from ops.chunked_attention import mosaic_gpu_step

  return mosaic_gpu_step.forward(*arrays, layer, chunks, near, scale=scale)


def _xla(
  q, k, v, chunk_k, chunk_v, ring_k, ring_v, layer, chunks, near, *, scale
):
  """Implements `chunked_attention_step` by products with all keys."""
  own = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
  of = lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False)
  keys = of(chunk_k), of(ring_k), k[:, None]
  values = of(chunk_v), of(ring_v), v[:, None]
  one = jnp.ones_like(near)

  def logits(keys, seen):
    found = jnp.einsum(
      "bngk,bsnk->bngs", own, keys, preferred_element_type=jnp.float32
    )
    slots = jnp.arange(keys.shape[1], dtype=jnp.int32)
    seen = slots[None] < seen[:, None]
    return jnp.where(seen[:, None, None], scale * found, -jnp.inf)

  # Every row sees its own token, so that no sum is 0.
  parts = [
    logits(some, seen)
    for some, seen in zip(keys, (chunks, near, one), strict=True)
  ]
  most = jnp.max(
    jnp.stack([jnp.max(part, axis=-1, initial=-jnp.inf) for part in parts]), 0
  )
  shares = [jnp.exp(part - most[..., None]) for part in parts]
  total = sum(jnp.sum(share, axis=-1) for share in shares)
  mixed = sum(
    jnp.einsum(
      "bngs,bsnk->bngk",
      (share / total[..., None]).astype(some.dtype),
      some,
      preferred_element_type=jnp.float32,
    )
    for share, some in zip(shares, values, strict=True)
  )
  return mixed.reshape(q.shape).astype(q.dtype)


def _check(q, k, v, chunk_k, chunk_v, ring_k, ring_v, chunks, near) -> None:
  op = "chunked_attention_step"
  if q.ndim != 3 or k.ndim != 3 or chunk_k.ndim != 5 or ring_k.ndim != 5:
    raise ValueError(
      f"{op}: q {q.shape}, k {k.shape}, chunk_k {chunk_k.shape} and ring_k"
      f" {ring_k.shape} are not (B, H, K), (B, N, K), (L, B, M, N, K) and"
      " (L, B, R, N, K)"
    )
  b, h, size = q.shape
  n, layers, m, r = (
    k.shape[1],
    chunk_k.shape[0],
    *(x.shape[2] for x in (chunk_k, ring_k)),
  )
  wanted = {
    "k": (k, (b, n, size)),
    "v": (v, (b, n, size)),
    "chunk_k": (chunk_k, (layers, b, m, n, size)),
    "chunk_v": (chunk_v, (layers, b, m, n, size)),
    "ring_k": (ring_k, (layers, b, r, n, size)),
    "ring_v": (ring_v, (layers, b, r, n, size)),
    "chunks": (chunks, (b,)),
    "near": (near, (b,)),
  }
  for name, (value, shape) in wanted.items():
    if value.shape != shape:
      raise ValueError(
        f"{op}: {name} is {value.shape}, but q {q.shape} and chunk_k"
        f" {chunk_k.shape} need {shape}"
      )
  if not n or h % n:
    raise ValueError(f"{op}: {h} query heads for {n} key heads")
