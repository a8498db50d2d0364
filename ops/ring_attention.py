"""`ring_attention`: causal attention to keys that go from device to device."""

import functools

import jax
import jax.numpy as jnp

from ops import sharding

# Queries and keys whose scores are in memory at a time.
_BLOCK = 1024
_LOWEST = jnp.finfo(jnp.float32).min


def ring_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  texts: jax.Array | None = None,
  block_size: int = _BLOCK,
) -> jax.Array:
  """Causal softmax attention of rows that are cut over devices.

  Each device keeps its queries, and keys and values go around a ring (Liu et
  al., https://arxiv.org/abs/2310.01889), their softmax summed online. What lies
  behind all of a device's queries is passed on and not computed. Without a mesh
  it is

    jax.nn.dot_product_attention(q, k, v, is_causal=True)

  in blocks, which keep no scores for the gradient and compute them again.

  Args:
    q: (B, L, H, K), bfloat16 or float32; heads and rows may be cut too.
    k: (B, L, N, K); query head h reads head h // (H // N).
    v: (B, L, N, K).
    texts: (B, L) int32; a token sees those of its own number alone. None for
      one text a row.
    block_size: queries, and keys, whose scores are in memory at a time.

  Returns:
    (B, L, H, K) in q's dtype; scores and sums are float32.

  Raises:
    ValueError: shapes do not fit each other.
  """
  if k.shape != v.shape or q.shape[2] % k.shape[2]:
    raise ValueError(
      f"ring_attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit"
    )
  arrays = {"q": q, "k": k, "v": v, "texts": texts}
  run = functools.partial(_attend, block_size)
  if not sharding.sizes():
    return run(1, **arrays)
  parts = 1
  if sharding.is_cut("length", q.shape[1]):
    parts = sharding.sizes()[sharding.SEQUENCE]
  heads = "heads" if sharding.is_cut("heads", q.shape[2], k.shape[2]) else None
  rows = ("batch", "length", heads, None)
  return sharding.over_devices(
    functools.partial(run, parts),
    arrays,
    {"q": rows, "k": rows, "v": rows, "texts": rows[:2]},
    rows,
  )


def _attend(block_size, parts, *, q, k, v, texts):
  b, length, heads, width = q.shape
  place = 0 if parts == 1 else jax.lax.axis_index(sharding.SEQUENCE)
  q = q.reshape(b, length, k.shape[2], -1, width)
  sums = (
    jnp.full((*q.shape[:-1],), _LOWEST, jnp.float32),
    jnp.zeros(q.shape[:-1], jnp.float32),
    jnp.zeros(q.shape, jnp.float32),
  )
  ring = [(i, (i + 1) % parts) for i in range(parts)]
  both = jnp.concatenate([k, v], axis=-1), texts
  add = functools.partial(_add, block_size, q, texts, place * length)
  sums = add(place * length, both, sums)
  for step in range(1, parts):
    both = jax.lax.ppermute(both, sharding.SEQUENCE, ring)
    begin = (place - step) * length
    # What a later device holds is behind all queries here.
    skip = lambda begin, both, sums: sums
    sums = jax.lax.cond(begin >= 0, add, skip, begin, both, sums)
  _, total, mixed = sums
  mixed = mixed / jnp.maximum(total, 1e-30)[..., None]
  return mixed.reshape(b, length, heads, width).astype(q.dtype)


def _add(block_size, q, texts, first_query, first_key, both, sums):
  """Adds the keys of one device to the sums of all queries, by blocks."""
  length = q.shape[1]
  size = min(block_size, length)
  pad = -length % size

  def blocks(x):
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

  keys = (*jax.tree.map(blocks, both), jnp.arange(0, length, size))

  @jax.checkpoint
  def one(block):
    q, texts, begin, sums = block
    queries = first_query + begin + jnp.arange(size)

    @jax.checkpoint
    def add_keys(sums, some):
      kv, key_texts, begin = some
      k, v = jnp.split(kv, 2, axis=-1)
      highest, total, mixed = sums
      scores = jnp.einsum(
        "blnrk,bmnk->blnrm", q, k, preferred_element_type=jnp.float32
      )
      scores = scores * q.shape[-1] ** -0.5
      own = begin + jnp.arange(size)
      seen = queries[:, None] >= first_key + own[None, :]
      # Padded keys are not seen, and padded queries are cut off.
      seen = (seen & (own < length)[None])[None]
      if texts is not None:
        seen &= texts[:, :, None] == key_texts[:, None, :]
      seen = seen[:, :, None, None, :]
      scores = jnp.where(seen, scores, _LOWEST)
      higher = jnp.maximum(highest, scores.max(-1))
      shares = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
      old = jnp.exp(highest - higher)
      added = jnp.einsum(
        "blnrm,bmnk->blnrk",
        shares.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
      )
      total = total * old + shares.sum(-1)
      return (higher, total, mixed * old[..., None] + added), None

    return jax.lax.scan(add_keys, sums, keys)[0]

  found = jax.lax.map(
    one,
    (
      blocks(q),
      jax.tree.map(blocks, texts),
      jnp.arange(0, length, size),
      jax.tree.map(blocks, sums),
    ),
  )
  whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[
    :, :length
  ]
  return jax.tree.map(whole, found)
