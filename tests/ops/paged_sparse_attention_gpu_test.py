"""Kernels of `paged_sparse_attention`, interpreted and lowered on a CPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.hopper import PROCESSORS, SHARED_MEMORY
from ops.paged_sparse_attention import (
  PageSummary,
  last_page_summary,
  mosaic_gpu,
  paged_sparse_attention,
  paged_sparse_attention_reference,
)
from ops.paged_sparse_attention.mosaic_gpu import Config
from ops.paged_sparse_attention.summary import page_logits
from tests.hopper_lowering import lowered
from tests.ops.paged_sparse_attention_test import all_pages_equal, make
from tests.ops.sequence_op import assert_close, tolerance

summarize_last = jax.jit(
  last_page_summary, static_argnames=("page_size", "kind")
)

# Query heads, key heads, head size.
MODELS = {"llama-3.2-1b": (32, 8, 64), "llama-3.1-8b": (32, 8, 128)}


def clear_counts(arrays, least, most):
  """Numbers of pages in [least, most) behind which scores fall the furthest.

  So rounding does not decide which pages are the best.
  """
  q, keys, _, summary, lengths = arrays
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (q, summary))
  grouped = wide[0].reshape(len(q), keys.shape[2], -1, q.shape[-1])
  scores = np.asarray(page_logits(grouped, wide[1]))
  page_size = keys.shape[1] // scores.shape[-1]
  counts = np.zeros(scores.shape[:2], np.int32)
  for row, head in np.ndindex(counts.shape):
    last = (int(lengths[row]) - 1) // page_size
    best = -np.sort(-scores[row, head, 1 : max(last, 1)])
    # Two pages are kept whatever their scores are.
    falls = (best[:-1] - best[1:])[least - 3 : most - 3]
    counts[row, head] = least + (np.argmax(falls) if falls.size else 0)
  return counts


@pytest.mark.parametrize(
  "changes, counts, config",
  [
    # Rows with more pages than are kept, with fewer, and with a part of one;
    # the last one's budget takes more tiles than stages.
    (
      {"kind": "moments", "slots": 1152, "lengths": (1150, 40, 7)},
      (17, 24),
      Config(splits=2, stages=2, tiles=1),
    ),
    # A row whose pages score alike, one without a token, and more splits than
    # another has pages.
    (
      {
        "heads": 3, "kv_heads": 1, "size": 128, "slots": 512, "page": 8,
        "lengths": (512, 0, 17),
      },
      (5, 9),
      Config(splits=4, stages=3, tiles=2),
    ),
  ],
)  # fmt: skip
def test_values(changes, counts, config):
  given = {"size": 64, "page": 16, "dtype": "bfloat16"} | changes
  arrays = make(1, **given)
  if 0 in given["lengths"]:
    arrays = all_pages_equal(arrays, row=0)
  num_pages = clear_counts(arrays, *counts)
  options = {"max_pages": counts[1], "scale": 0.1}
  expected = paged_sparse_attention_reference(*arrays, num_pages, **options)
  found, last = mosaic_gpu.forward(
    *arrays, jnp.asarray(num_pages), **options, summarize=True, config=config,
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )  # fmt: skip
  assert_close(found, expected, tolerance("bfloat16", 16 * counts[1]))
  _, keys, _, summary, lengths = arrays
  expected = summarize_last(
    keys, lengths, page_size=given["page"], kind=summary.kind
  )
  assert_close(last, expected, tolerance("bfloat16", given["page"]))


@pytest.mark.skipif(
  dispatch.needs_wgmma() is not None, reason="runs on a Hopper GPU"
)
@pytest.mark.parametrize("kind", ["bounds", "moments"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch, slots", [(1, 8192), (5, 8320), (2, 32768)])
def test_a_gpu_agrees_with_float64(batch, slots, model, kind):
  heads, kv_heads, size = MODELS[model]
  lengths = np.random.default_rng(0).integers(1, slots, batch)
  lengths[0] = slots
  arrays = make(
    2, batch=batch, heads=heads, kv_heads=kv_heads, size=size, slots=slots,
    page=16, lengths=lengths, kind=kind, dtype="bfloat16",
  )  # fmt: skip
  most = slots // 64
  run = jax.jit(
    functools.partial(
      paged_sparse_attention, max_pages=most, implementation="mosaic_gpu"
    )
  )
  # One program serves budgets that differ by head, row and call.
  for counts in ((most // 2, most), (6, 40)):
    num_pages = clear_counts(arrays, *counts)
    expected = paged_sparse_attention_reference(
      *arrays, num_pages, max_pages=most
    )
    found = run(*arrays, jnp.asarray(num_pages))
    assert_close(found, expected, tolerance("bfloat16", 16 * counts[1]))


def shapes_of(model, batch, slots, page=16):
  heads, kv_heads, size = MODELS[model]
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  cache = of(batch, slots, kv_heads, size)
  part = of(batch, slots // page, kv_heads, size)
  q, summary = of(batch, heads, size), PageSummary(part, part, "bounds")
  return q, cache, cache, summary, ints(batch), ints(batch, kv_heads)


@pytest.mark.parametrize(
  "model, batch, slots",
  [("llama-3.2-1b", 1, 8320), ("llama-3.1-8b", 16, 32768)],
)
def test_lowers_for_hopper(model, batch, slots):
  run = functools.partial(mosaic_gpu.forward, max_pages=slots // 64, scale=0.1)
  twice = lambda *arrays: [run(*arrays) for _ in range(2)]
  module = lowered(twice, *shapes_of(model, batch, slots))
  # Both calls are of one function, which is lowered once.
  assert module.count("custom_call @mosaic_gpu_v2") == 1


def test_what_is_mapped_over_are_rows():
  run = functools.partial(mosaic_gpu.forward, max_pages=32, scale=0.1)
  shapes = shapes_of("llama-3.2-1b", 1, 2048)
  q, *rest = shapes
  wide = jax.ShapeDtypeStruct((3, *q.shape), q.dtype)
  module = lowered(jax.vmap(run, (0, *[None] * len(rest))), wide, *rest)
  assert module.count("custom_call @mosaic_gpu_v2") == 1
  # Rows of q, of which the three calls have one each.
  assert "tensor<3x32x64xbf16>" in module


def test_gradients_are_those_of_xla():
  def loss(q, keys, values, *rest):
    run = functools.partial(mosaic_gpu.forward, max_pages=32, scale=0.1)
    out, last = run(q, keys, values, *rest, summarize=True)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(last.first)

  shapes = shapes_of("llama-3.2-1b", 1, 2048)
  found = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), *shapes)
  assert found == shapes[:3]


def test_blocks_fit_into_shared_memory():
  for heads, size in ((8, 64), (8, 128), (3, 64), (1, 128)):
    for batch in (1, 4, 16, 64):
      for pages in (64, 512, 2048, 8192):
        for kept in (2, pages // 4, pages):
          c = mosaic_gpu.configure(batch, heads, size, pages, 16, kept)
          listed = -(-kept // c.splits)
          ring = c.stages * 2 * 64 * size
          scores = c.tiles * 8 * (4 * 68 + 2 * 64)
          lists = 4 * (pages * 3 // 64 + listed)
          rest = 3 * 2 * 8 * size + 4 * 8 * 68 + 1024
          assert c.stages >= 2
          assert ring + scores + lists + rest <= SHARED_MEMORY
          assert c.splits in (1, 2, 4, 8, 16)
          assert c.splits == 1 or c.splits * batch * heads <= 2 * PROCESSORS


def test_what_the_kernels_do_not_take():
  q, keys, values, summary, lengths, counts = shapes_of("llama-3.2-1b", 1, 1024)
  wide = lambda x, **more: jax.ShapeDtypeStruct(
    **({"shape": x.shape, "dtype": x.dtype} | more)
  )
  assert mosaic_gpu.unfit(q, keys, values, summary) is None
  few = jax.tree.map(lambda x: wide(x, shape=(1, 32, 8, 64)), summary)
  for changed, message in (
    ({"keys": wide(keys, dtype=jnp.float32)}, "keys is float32"),
    ({"q": wide(q, shape=(1, 72, 64))}, "at most 8 queries"),
    ({"keys": wide(keys, shape=(1, 1024, 8, 32))}, "heads of 64"),
    ({"summary": few}, "64 to 8192 pages"),
    ({"keys": wide(keys, shape=(1, 256, 8, 64))}, "not 4"),
  ):
    given = {"q": q, "keys": keys, "values": values, "summary": summary}
    assert message in mosaic_gpu.unfit(**(given | changed))
  if jax.default_backend() == "cpu":
    with pytest.raises(dispatch.UnsupportedError, match="needs an NVIDIA GPU"):
      paged_sparse_attention(*make(), 3, implementation="mosaic_gpu")
