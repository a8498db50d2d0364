"""Attention over chunks and a window, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.chunked_attention import (
  UNUSED,
  api,
  chunked_attention,
  chunked_attention_reference,
  mosaic_tpu,
  xla,
)
from tests.ops.sequence_op import EPSILON, assert_close, tolerance

B, S, H, N, D = 2, 37, 4, 2, 8
# Rows with other boundaries; the second has fewer.
ENDS = np.array(
  [[0, 3, 4, 11, 19, 28, 36], [6, 7, 22, 30, UNUSED, UNUSED, UNUSED]], np.int32
)
# Two texts in the first row, three in the second.
STARTS = np.array([[0] * 13 + [13] * 24, [0] + [1] * 24 + [25] * 12], np.int32)


def draw(*shape, dtype="float32", seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def arrays(dtype="float32"):
  shapes = (B, S, H, D), (B, S, N, D), (B, S, N, D)
  return [draw(*x, dtype=dtype, seed=i) for i, x in enumerate(shapes)]


def pools(dtype="float32"):
  return {
    name: draw(B, ENDS.shape[1], N, D, dtype=dtype, seed=i)
    for i, name in enumerate(("chunk_k", "chunk_v"), 3)
  }


SEEN_FROM = np.where(ENDS < UNUSED, ENDS + 3, UNUSED).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("window", "top"))
def pull(q, k, v, dy, window, top, starts, pooled, seen_from):
  def run(q, k, v, pooled):
    return chunked_attention(
      q, k, v, ENDS, window=window, top=top, starts=starts,
      seen_from=seen_from, **pooled,
    )  # fmt: skip

  y, back = jax.vjp(run, q, k, v, pooled)
  return y, back(dy)


@pytest.mark.parametrize(
  "window, packed, pooled, top, dtype",
  [
    (0, False, False, 3, "float32"),
    (5, True, True, None, "float32"),
    (40, True, False, None, "bfloat16"),
  ],
)
def test_output_and_gradients(window, packed, pooled, top, dtype):
  q, k, v = arrays(dtype)
  dy = draw(B, S, H, D, dtype=dtype, seed=9)
  starts = STARTS if packed else None
  own, seen_from = (pools(dtype), SEEN_FROM) if pooled else ({}, None)
  y, found = pull(q, k, v, dy, window, top, starts, own, seen_from)
  assert y.dtype == q.dtype
  wide = lambda x: np.asarray(x, np.float64)
  options = {"window": window, "starts": starts, "seen_from": seen_from}
  options["top"] = top
  exact = chunked_attention_reference(
    wide(q), wide(k), wide(v), ENDS, **options, **own
  )
  # Shares are rounded once, and what they weigh is at most some 4.
  limit = tolerance("float32", S + D) + (
    4 * EPSILON[dtype] if dtype == "bfloat16" else 0
  )
  assert_close(y, exact, limit)
  assert jax.tree.structure(found) == jax.tree.structure((q, k, v, own))
  if dtype == "bfloat16":
    return
  # The slope along a direction by central differences in float64.
  step = 1e-5
  inputs = {"q": q, "k": k, "v": v, **own}
  slopes = dict(zip("qkv", found)) | found[3]
  for seed, name in enumerate(inputs, 20):
    along = wide(draw(*inputs[name].shape, seed=seed))
    at = lambda c, n=name, a=along: chunked_attention_reference(
      ends=ENDS,
      **options,
      **{
        key: wide(x) + (c * a if key == n else 0) for key, x in inputs.items()
      },
    )
    slope = np.sum((at(step) - at(-step)) * wide(dy)) / (2 * step)
    ours = np.sum(wide(slopes[name]) * along)
    scale = np.linalg.norm(along) * np.linalg.norm(wide(slopes[name]))
    assert abs(ours - slope) < 1e-5 * scale


def rows(length, chunks, window, *, packed, pooled):
  """Two rows with boundaries of their own, the first with fewer chunks."""
  rng = np.random.default_rng(length)
  ends = [rng.choice(length, chunks, replace=False) for _ in range(2)]
  ends = np.sort(np.stack(ends), axis=1).astype(np.int32)
  ends[0, -chunks // 4 :] = UNUSED
  # Pooled chunks may be seen in another order than that of their ends.
  later = rng.integers(0, 30, ends.shape) if pooled else window
  seen_from = np.where(ends < UNUSED, ends + 1 + later, UNUSED)
  starts = None
  if packed:
    slots, cuts = np.arange(length), (40, length // 2 + 1)
    starts = np.max([np.where(slots >= cut, cut, 0) for cut in cuts], axis=0)
    starts = np.stack([starts, 0 * starts]).astype(np.int32)
  return ends, seen_from.astype(np.int32), starts


def run(q, k, v, chunk_k, chunk_v, dy, implementation=None, **options):
  own = {"chunk_k": chunk_k, "chunk_v": chunk_v}
  own = {name: x for name, x in own.items() if x is not None}

  def call(q, k, v, own):
    return chunked_attention(
      q, k, v, implementation=implementation, **own, **options
    )

  y, back = jax.vjp(call, q, k, v, own)
  return y, back(dy.astype(y.dtype))


@pytest.mark.parametrize(
  "length, chunks, window, heads, packed, dtype",
  [
    # Three tiles of tokens in a window's reach, texts, two queries a key.
    (300, 140, 150, (2, 1), True, "float32"),
    # Keys of last tokens, no window, a tile of chunks without a mask.
    (384, 260, 0, (1, 1), False, "bfloat16"),
    # No chunks.
    (90, 0, 20, (1, 1), False, "float32"),
  ],
)
def test_tpu_kernels(monkeypatch, length, chunks, window, heads, packed, dtype):
  """Interpreted, outputs and gradients against those of XLA in float32."""
  ends, seen_from, starts = rows(
    length, chunks, window, packed=packed, pooled=packed
  )
  h, n = heads
  of = functools.partial(draw, dtype=dtype)
  q, k, v = (of(2, length, x, 16, seed=i) for i, x in enumerate((h, n, n)))
  own = [of(2, chunks, n, 16, seed=i) for i in (3, 4)] if packed else [None] * 2
  dy = of(2, length, h, 16, seed=5)
  options = {
    "ends": ends, "window": window, "starts": starts, "seen_from": seen_from
  }  # fmt: skip
  f32 = jax.tree.map(lambda x: x.astype("float32"), (q, k, v, *own, dy))
  call = functools.partial(run, implementation="xla", **options)
  expected = jax.jit(call)(*f32)
  everywhere = dict.fromkeys(api.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)
  config = mosaic_tpu.Config(size=128, interpret=True)
  monkeypatch.setattr(
    mosaic_tpu, "forward", functools.partial(mosaic_tpu.forward, config=config)
  )
  call = functools.partial(run, implementation="mosaic_tpu", **options)
  found = jax.jit(call)(q, k, v, *own, dy)
  assert found[0].dtype == q.dtype
  assert_close(found, expected, tolerance(dtype, length + 16))


def test_what_the_tpu_kernels_take(monkeypatch):
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
  supports = api.IMPLEMENTATIONS["mosaic_tpu"]
  q, k, v = arrays()
  reason = functools.partial(supports, q, k, v, ENDS, window=3, scale=None)
  assert reason() is None
  assert "highest scores" in reason(top=3)
  assert "multiple of 8" in supports(q[..., :5])
  assert "float16" in supports(q.astype("float16"))
  with pytest.raises(ValueError, match="multiple of 8 channels"):
    mosaic_tpu.forward(*[q[..., :5]] * 5, ENDS, ENDS, None, window=1, scale=1.0)
  assert mosaic_tpu.configure(100).size == 128
  assert mosaic_tpu.configure(1000).size == 256


def test_every_token_a_chunk_is_causal_attention():
  q, k, v = arrays()
  ends = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (B, S))

  @jax.jit
  def run(q, k, v):
    plain = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    ours = functools.partial(chunked_attention, window=3)
    rows = lambda x: x[:, None]
    alone = jax.vmap(ours)(rows(q), rows(k), rows(v), rows(ends))
    return plain, ours(q, k, v, ends), alone

  plain, ours, alone = run(q, k, v)
  assert_close(ours, plain, 2 * tolerance("float32", S + D))
  assert_close(alone[:, 0], plain, 2 * tolerance("float32", S + D))


def test_many_queries_go_in_blocks(monkeypatch):
  """Of 5 queries, the last of which is not full; gradients are the same."""
  q, k, v = arrays()

  def loss(q, k, v):
    y = chunked_attention(q, k, v, ENDS, window=5, starts=STARTS)
    return jnp.sum(y * y), y

  run = lambda: jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  whole = run()
  monkeypatch.setattr(xla, "_MOST_SCORES", 5 * B * H * ENDS.shape[1])
  jax.clear_caches()
  blocks = run()
  for one, other in zip(*map(jax.tree.leaves, (whole, blocks)), strict=True):
    assert_close(one, np.asarray(other), 4 * tolerance("float32", S + D))


def test_scores_are_few():
  """No array has S x S numbers, forward or backward."""
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  s, m, window = 4096, 512, 64
  q, ends = shape((1, s, 2, 8)), jax.ShapeDtypeStruct((1, m), jnp.int32)

  def loss(q, k, v, ends):
    return jnp.sum(chunked_attention(q, k, v, ends, window=window))

  found = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, q, q, ends)
  sizes = [v.aval.size for eqn in found.jaxpr.eqns for v in eqn.outvars]
  assert max(sizes) == 2 * s * m < 2 * s * s / 4


def test_what_does_not_fit():
  q, k, v = arrays()
  with pytest.raises(ValueError, match="window is -1"):
    chunked_attention(q, k, v, ENDS, window=-1)
  with pytest.raises(ValueError, match="top is 0"):
    chunked_attention(q, k, v, ENDS, window=1, top=0)
  with pytest.raises(ValueError, match="3 query heads for 2 key heads"):
    chunked_attention(q[:, :, :3], k, v, ENDS, window=1)
  with pytest.raises(ValueError, match="starts is"):
    chunked_attention(q, k, v, ENDS, window=1, starts=STARTS[:1])
  with pytest.raises(ValueError, match="come together"):
    chunked_attention(q, k, v, ENDS, window=1, chunk_k=k[:, :7])
