"""The public `chunked_attention`: checks, resolves, calls."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp

from ops import dispatch, sharding

# Slots of a chunk key that stands for no chunk.
UNUSED = 2**30

IMPLEMENTATIONS = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.kernel(
      "ops.chunked_attention.mosaic_gpu", dispatch.needs_wgmma
    ),
    "mosaic_tpu": dispatch.kernel(
      "ops.chunked_attention.mosaic_tpu", dispatch.needs_tpu
    ),
    "xla": dispatch.always,
  }
)


def chunked_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ends: jax.Array,
  *,
  window: int,
  chunk_k: jax.Array | None = None,
  chunk_v: jax.Array | None = None,
  seen_from: jax.Array | None = None,
  starts: jax.Array | None = None,
  top: int | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attends to the last keys one by one, and to earlier ones by chunks.

  Attamba (https://arxiv.org/abs/2411.17685, equation 8): query t sees the keys
  of the window t - L to t, and one key of each chunk in front of it,

    out_t = softmax(scale * q_t . [k_{t-L..t}, chunk_k_m | m is seen by t]) .
            [v_{t-L..t}, chunk_v_m]

  Both parts have a softmax of their own, merged by their log-sum-exp. Query
  head h reads key head h // (H / N). With every token a chunk it is
  `jax.nn.dot_product_attention(q, k, v, is_causal=True)`.

  Args:
    q: (B, S, H, D), bfloat16 or float32.
    k: (B, S, N, D).
    v: (B, S, N, D).
    ends: Slot of each chunk's last token, (B, M) int32, rising in each row;
      `UNUSED` behind the last chunk. Rows may have other boundaries.
    window: L >= 0, earlier tokens that a query sees one by one.
    chunk_k: Key of each chunk, (B, M, N, D); None for k at `ends`.
    chunk_v: Value of each chunk, (B, M, N, D); None for v at `ends`.
    seen_from: First slot whose query sees the chunk, (B, M) int32, behind its
      end; None for `ends + window + 1`, where the window no longer shows the
      chunk's last token: where chunk keys are those of last tokens, each is
      seen once.
    starts: Slot at which the text of each token begins, (B, S) int32: nothing
      in front of it is seen. None for 0.
    top: Of the chunks in sight a query sees so many, the ones whose logits,
      summed over the query heads of a key head, are the highest; those that
      tie with the last one too. None for all.
    scale: Factor of the logits, D**-0.5 by default.
    implementation: `"mosaic_gpu"` (Hopper, bfloat16, heads of 64 channels),
      `"mosaic_tpu"` (heads of a multiple of 8 channels, at most 256), both for
      all chunks; `"xla"`, or None for the best that runs here.

  Returns:
    (B, S, H, D) in q's dtype. Logits and sums are float32. Work and memory are
    of the order of B H S (M + L), also for the gradients, which q, k, v,
    chunk_k and chunk_v have.

  Raises:
    ValueError: Shapes do not fit each other, the window is negative, or `top`
      is not positive.
  """
  _check(q, k, v, ends, window, chunk_k, chunk_v, seen_from, starts)
  if top is not None and top < 1:
    raise ValueError(f"chunked_attention: top is {top}, it must be at least 1")
  if sharding.sizes():
    arrays = {
      "q": q, "k": k, "v": v, "ends": ends, "chunk_k": chunk_k,
      "chunk_v": chunk_v, "seen_from": seen_from, "starts": starts,
    }  # fmt: skip
    options = {
      "window": window,
      "top": top,
      "scale": scale,
      "implementation": implementation,
    }
    return _over_devices(options, arrays)
  name = dispatch.resolve(
    "chunked_attention",
    IMPLEMENTATIONS,
    implementation,
    q,
    k,
    v,
    ends,
    window=window,
    top=top,
    scale=scale,
  )
  if chunk_k is None:
    chunk_k, chunk_v = _at(k, ends), _at(v, ends)
  if seen_from is None:
    seen_from = ends + (window + 1)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  run = importlib.import_module(f"ops.chunked_attention.{name}").forward
  return run(
    q, k, v, chunk_k, chunk_v, ends, seen_from, starts,
    window=window, top=top, scale=scale,
  )  # fmt: skip


def _over_devices(options, arrays):
  """Every device has its own rows and heads, and whole rows of tokens."""
  heads = ("batch", None, "heads", None)
  dims = {name: heads if x.ndim == 4 else ("batch", None)
          for name, x in arrays.items() if x is not None}  # fmt: skip
  return sharding.over_devices(
    functools.partial(chunked_attention, **options), arrays, dims, heads
  )


def _at(x, ends):
  """Rows of x (B, S, N, D) at the ends, zeros where there is none.

  Ends are told to be different, because gradients are then stored instead of
  added one by one; those of no chunk are so behind the last slot.
  """
  length, count = x.shape[1], ends.shape[1]
  behind = length + jnp.arange(count, dtype=jnp.int32)[None]
  slots = jnp.where(ends < length, ends, behind)
  rows = jnp.arange(x.shape[0])[:, None]
  return x.at[rows, slots].get(
    mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
  )


def _check(q, k, v, ends, window, chunk_k, chunk_v, seen_from, starts):
  op = "chunked_attention"
  if q.ndim != 4 or k.ndim != 4 or ends.ndim != 2:
    raise ValueError(
      f"{op}: q is {q.shape}, k {k.shape} and ends {ends.shape}, not "
      "(B, S, H, D), (B, S, N, D) and (B, M)"
    )
  b, s, h, d = q.shape
  n, m = k.shape[2], ends.shape[1]
  wanted = {
    "k": (k, (b, s, n, d)),
    "v": (v, (b, s, n, d)),
    "ends": (ends, (b, m)),
    "chunk_k": (chunk_k, (b, m, n, d)),
    "chunk_v": (chunk_v, (b, m, n, d)),
    "seen_from": (seen_from, (b, m)),
    "starts": (starts, (b, s)),
  }
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(
        f"{op}: {name} is {value.shape}, but q {q.shape} and ends {ends.shape} "
        f"need {shape}"
      )
  if (chunk_k is None) != (chunk_v is None):
    raise ValueError(f"{op}: chunk_k and chunk_v come together or not at all")
  if not n or h % n:
    raise ValueError(f"{op}: {h} query heads for {n} key heads")
  if window < 0:
    raise ValueError(f"{op}: window is {window}, it must be at least 0")
