"""The Mosaic GPU `chunked_attention`: interpreted and lowered on a CPU.

On a Hopper GPU the kernels themselves run.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import chunked_attention, dispatch
from ops.chunked_attention import (
  api,
  chunked_attention_reference,
  mosaic_gpu,
)
from ops.chunked_attention.mosaic_gpu_tiles import Config
from ops.chunked_attention.spans import bounds, spans
from tests.hopper_lowering import lowered
from tests.ops.chunked_attention_test import draw, rows, run
from tests.ops.sequence_op import assert_close, tolerance

# One warpgroup, since two that wait for each other may hang interpreted.
SMALL = Config(workers=1, keys=64, stages=2)
HAS_GPU = mosaic_gpu.supports() is None
# Name: length, chunks, window, heads of queries and keys, config where it is
# interpreted, whether texts are packed, whether chunks are pooled.
CASES = {
  # Odd lengths, keys of last tokens, three blocks in a window's reach.
  "wide": (150, 70, 100, (1, 1), SMALL, False, False),
  # Texts, a key head for two query heads, queries in two parts.
  "packed": (
    130, 40, 20, (2, 1), Config(workers=1, stages=2, parts=2), True, True
  ),
}  # fmt: skip
if HAS_GPU:
  CASES |= {
    "long": (2048, 256, 64, (4, 4), None, False, False),
    "long packed": (1999, 500, 32, (4, 2), None, True, True),
    "no window": (1024, 128, 0, (2, 2), None, False, True),
  }


@pytest.fixture
def interpreted(monkeypatch):
  """Returns the op as the interpreter runs it, by a `Config`.

  On a GPU as that runs it, by the config that fits.
  """
  if HAS_GPU:
    return lambda config: functools.partial(run, implementation="mosaic_gpu")
  everywhere = dict.fromkeys(api.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)
  forward = mosaic_gpu.forward

  def by(config):
    # Memory that is read and written in no set order is an error.
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    options = {"config": config, "interpret": interpret}
    monkeypatch.setattr(
      mosaic_gpu, "forward", functools.partial(forward, **options)
    )
    return functools.partial(run, implementation="mosaic_gpu")

  return by


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(interpreted, case):
  length, chunks, window, (h, n), config, packed, pooled = CASES[case]
  ends, seen_from, starts = rows(
    length, chunks, window, packed=packed, pooled=pooled
  )
  bf16 = functools.partial(draw, dtype="bfloat16")
  q, k, v = (bf16(2, length, x, 64, seed=i) for i, x in enumerate((h, n, n)))
  own = [bf16(2, chunks, n, 64, seed=i) for i in (3, 4)]
  own = own if pooled else [None, None]
  dy = bf16(2, length, h, 64, seed=5)
  options = {"window": window, "starts": starts, "seen_from": seen_from}
  call = functools.partial(interpreted(config), ends=ends, **options)
  found = jax.jit(call)(q, k, v, *own, dy)
  wide = lambda x: None if x is None else np.asarray(x, np.float64)
  exact = chunked_attention_reference(
    *map(wide, (q, k, v)),
    ends,
    chunk_k=wide(own[0]),
    chunk_v=wide(own[1]),
    **options,
  )
  limit = tolerance("bfloat16", length + 64)
  assert_close(found[0], exact, limit)
  # The oracle of gradients, which is held to slopes in float64 elsewhere.
  f32 = jax.tree.map(lambda x: x.astype("float32"), (q, k, v, *own, dy))
  call = functools.partial(run, implementation="xla", ends=ends, **options)
  expected = jax.jit(call)(*f32)
  assert_close(found[1], expected[1], limit)


def test_bounds():
  """Every pair that is seen is met, and none without a mask that is not."""
  ends, seen_from, starts = rows(256, 128, 9, packed=True, pooled=True)
  slots = np.arange(256)[:, None]
  pairs = (seen_from[:, None] <= slots) & (ends[:, None] >= starts[..., None])
  pairs = pairs.reshape(2, 8, 32, 4, 32)
  seen, whole = bounds(
    jnp.asarray(seen_from), jnp.asarray(ends), jnp.asarray(starts), 32, 32, 256
  )
  seen, whole = np.asarray(seen), np.asarray(whole)
  assert not np.any(pairs.any(axis=(2, 4)) & ~seen)
  # It may be blind to a chunk and a start that lie in different tokens.
  assert not np.any(whole & ~pairs.all(axis=(2, 4)))
  for first in (False, True):
    found = spans(jnp.asarray(seen), jnp.asarray(whole), first)
    found = np.asarray(found)
    begin, start, stop, end = np.moveaxis(found, -1, 0)
    places = np.arange(4)
    met = (places >= begin[..., None]) & (places < end[..., None])
    assert not np.any(seen & ~met)
    bare = (places >= start[..., None]) & (places < stop[..., None])
    assert not np.any(bare & ~whole) and not np.any(bare & ~met)
    assert first or np.all(begin == start)
  # Of the second row, which is one text, some tiles need no mask.
  assert bare[1].any()


def arguments(b, s, h, n, m):
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  ends = jax.ShapeDtypeStruct((b, m), jnp.int32)
  return *(bf16((b, s, x, 64)) for x in (h, n, n)), ends


@pytest.mark.parametrize(
  "shape, window", [((1, 32768, 16, 16, 4096), 64), ((2, 1000, 4, 2, 250), 32)]
)
def test_gradients_lower_for_hopper(monkeypatch, shape, window):
  everywhere = dict.fromkeys(api.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)

  def gradients(q, k, v, ends):
    return run(
      q, k, v, None, None, q, "mosaic_gpu", ends=ends, window=window
    )  # fmt: skip

  module = lowered(gradients, *arguments(*shape))
  assert module.count("mosaic_gpu_v2") == 4


def test_configurations():
  configure = mosaic_gpu.configure
  assert configure(32768, 4096, 16, 64) == Config()
  # One tile of keys a head, whose queries go to several thread blocks.
  assert configure(8192, 128, 16, 64).parts == 8
  assert configure(60, 7, 2, 3).workers == 1
  assert configure(1024, 128, 8, 288).stages == 2
  assert configure(4096, 128, 8, 2000) is None


def test_reasons():
  q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
  assert mosaic_gpu.unfit(q, 3, None) is None
  assert "bfloat16" in mosaic_gpu.unfit(q.astype("float32"), 3, None)
  assert "64 channels" in mosaic_gpu.unfit(q[..., :32], 3, None)
  assert "positive" in mosaic_gpu.unfit(q, 3, -1.0)
  long = jnp.zeros((1, 4096, 1, 64), jnp.bfloat16)
  assert "2000 tokens" in mosaic_gpu.unfit(long, 2000, None)
  ends = jnp.zeros((1, 3), jnp.int32)
  with pytest.raises(ValueError, match="bfloat16"):
    mosaic_gpu.forward(
      *[q.astype("float32")] * 5, ends, ends, None, window=1, scale=1.0
    )
  with pytest.raises(dispatch.UnsupportedError, match="needs an|64 channels"):
    q = q[..., :32]
    chunked_attention(q, q, q, ends, window=1, implementation="mosaic_gpu")
