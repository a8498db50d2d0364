import functools

import jax
import jax.numpy as jnp
import pytest

from ops.chunked_attention import mosaic_tpu
from tests import tpu_compile


@pytest.mark.parametrize(
  "target, dtype, shape, window",
  [
    ("v5e", "bfloat16", (1, 4096, 16, 16, 64, 513), 64),
    # Lengths that do not fill tiles, two queries a key.
    ("v6e", "float32", (2, 300, 4, 2, 32, 70), 32),
  ],
)
def test_all_passes_compile(target, dtype, shape, window):
  b, s, h, n, d, m = shape
  of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  line = lambda count: jax.ShapeDtypeStruct((b, count), jnp.int32)
  q, k, chunk = of(b, s, h, d), of(b, s, n, d), of(b, m, n, d)

  def gradients(q, k, v, chunk_k, chunk_v, ends, seen_from, starts, dy):
    call = functools.partial(
      mosaic_tpu.forward, ends=ends, seen_from=seen_from, starts=starts,
      window=window, scale=0.1,
    )  # fmt: skip
    y, pull = jax.vjp(call, q, k, v, chunk_k, chunk_v)
    return y, pull(dy)

  compiled = tpu_compile.compile_for(
    target, gradients, q, k, k, chunk, chunk, line(m), line(m), line(s), q
  )
  assert tpu_compile.kernels(compiled) == [
    "chunked_attention_bwd_chunks",
    "chunked_attention_bwd_queries",
    "chunked_attention_bwd_tokens",
    "chunked_attention_fwd",
  ]
