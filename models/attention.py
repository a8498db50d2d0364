"""Softmax attention to texts, whose rows are padded at their end.

Shapes by axis letter: B batch, Q queries, L keys, H query heads, N key/value
heads, K head dimension.
"""

import functools

import jax
import jax.numpy as jnp

# Scores a head that are worth a fused kernel: 64 queries of 512 keys.
_LEAST_SCORES = 1 << 15
# Scores that XLA holds at a time: 1 GiB of float32, and as much of gradients.
_MOST_SCORES = 1 << 28


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
