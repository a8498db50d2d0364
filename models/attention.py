"""Softmax attention in one pass: among the tokens of a call, and to texts.

Attention to what earlier calls have read is in `models.caches`. Shapes by axis
letter: B batch, T tokens, Q queries, L keys, H query heads, N key/value heads,
K head dimension.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ops import segments, sharding
from ops.quantized import as_array
from ops.ring_attention import ring_attention

# (q (..., H, K), k (..., N, K), v, layer_input) -> (out (..., H, K), output);
# keys and values may be QTensors. Models with sliding layers pass a fifth
# argument, `behind`: how many tokens in front of it a token sees in this layer.
Attend = Callable[..., tuple[jax.Array, Any]]

# Scores a head that are worth a fused kernel: 64 queries of 512 keys.
_LEAST_SCORES = 1 << 15
# Scores that XLA holds at a time: 1 GiB of float32, and as much of gradients.
_MOST_SCORES = 1 << 28


def causal_attend(
  segment_ids: jax.Array | None = None,
  *,
  implementation: str | None = None,
  keep: bool = True,
) -> Attend:
  """Causal attention among the tokens of one call, each within its own text.

  Where a layer slides, `behind` is an integer, or an integer scalar of a scan
  over layers, for which a mask (T, T) is made.

  Args:
    segment_ids: (B, T) int32 as `ops.segments` defines them: an id that comes
      back is another text. None for one text a row.
    implementation: of `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
    keep: output the (k, v) of the tokens; training has no use for them.
  """
  mask = texts = None
  if segment_ids is not None:
    texts = jnp.cumsum(segments.resets(segment_ids), axis=1)
    texts = jnp.where(segments.is_padding(segment_ids), -1, texts)
    mask = (texts[:, :, None] == texts[:, None, :])[:, None]

  def attend(q, k, v, _, behind=None):
    kept = (k, v) if keep else None
    # A ring over devices has every key pass by every query, so it has no use
    # for a window; XLA gathers the keys of sliding layers instead.
    if behind is None and q.ndim == 4 and sharding.is_cut("length", q.shape[1]):
      return ring_attention(q, as_array(k), as_array(v), texts=texts), kept
    seen, window = mask, None
    if isinstance(behind, int):
      window = (behind, 0)
    elif behind is not None:
      near = is_near(q.shape[1], behind)
      seen = near if mask is None else mask & near
    mixed = jax.nn.dot_product_attention(
      q,
      as_array(k),
      as_array(v),
      mask=seen,
      is_causal=True,
      local_window_size=window,
      implementation=implementation,
    )
    return mixed, kept

  return attend


def is_near(length: int, behind: jax.Array) -> jax.Array:
  """Which keys are at most `behind` in front of each query: (1, 1, T, T)."""
  steps = jnp.arange(length, dtype=jnp.int32)
  return (steps[:, None] - steps[None] <= behind)[None, None]


def attend_to_text(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lengths: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Attention of every query to the first `lengths` keys of its row.

  Args:
    q: (B, Q, H, K).
    k: (B, L, N, K).
    v: (B, L, N, K).
    lengths: (B,) int32, 1 to L.
    implementation: "xla"; "cudnn", a kernel that keeps no scores, for 16-bit
      inputs on NVIDIA GPUs; None takes the kernel where it runs here and there
      are scores enough. Without it queries go in blocks where there are many
      scores, which are computed again for the gradient.

  Returns:
    (B, Q, H, K).
  """
  queries, keys = q.shape[1], k.shape[1]
  # The kernel's gradient is for even numbers alone.
  fits = queries % 2 == keys % 2 == 0 and queries * keys >= _LEAST_SCORES
  if implementation is None and fits:
    heads = q.shape[2], k.shape[2], q.shape[3]
    implementation = "cudnn" if cudnn_runs(*heads, q.dtype.name) else None
  attend = functools.partial(
    jax.nn.dot_product_attention,
    key=k,
    value=v,
    key_value_seq_lengths=lengths.astype(jnp.int32),
    implementation=implementation,
  )
  most = max(_MOST_SCORES // (q.shape[0] * q.shape[2] * keys), 1)
  if implementation == "cudnn" or queries <= most:
    return attend(q)
  return _in_blocks(attend, q, most)


def _in_blocks(attend, q: jax.Array, size: int) -> jax.Array:
  """`attend` of blocks of `size` queries, one after the other."""
  b, queries, *rest = q.shape
  padded = jnp.pad(q, ((0, 0), (0, -queries % size), (0, 0), (0, 0)))
  blocks = jnp.moveaxis(padded.reshape(b, -1, size, *rest), 1, 0)
  mixed = jax.lax.map(jax.checkpoint(attend), blocks)
  return jnp.moveaxis(mixed, 0, 1).reshape(padded.shape)[:, :queries]


@functools.lru_cache(maxsize=64)
def cudnn_runs(heads: int, kv_heads: int, head_dim: int, dtype: str) -> bool:
  """Whether cuDNN has the kernel and its gradient here, by compiling both."""
  if jax.default_backend() != "gpu" or dtype not in ("bfloat16", "float16"):
    return False

  def loss(q, k, v, lengths):
    mixed = attend_to_text(q, k, v, lengths, implementation="cudnn")
    return jnp.sum(mixed.astype(jnp.float32))

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
  queries = shape((1, 64, heads, head_dim))
  keys = shape((1, 128, kv_heads, head_dim))
  lengths = jax.ShapeDtypeStruct((1,), "int32")
  try:
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(
      queries, keys, keys, lengths
    ).compile()
  except Exception:  # Of jax, XLA or cuDNN: all mean that it does not run.
    return False
  return True
