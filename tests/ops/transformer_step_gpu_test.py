"""The GPU kernels of `transformer_step`, interpreted and lowered on a CPU."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dequantize, dispatch, quantize
from ops.hopper import PROCESSORS, SHARED_MEMORY
from ops.transformer_step import (
  TransformerWeights,
  mosaic_gpu,
  transformer_step,
  transformer_step_reference,
)
from ops.transformer_step.mosaic_gpu import Config
from ops.transformer_step.mosaic_gpu_few_bits import MATRICES
from tests.hopper_lowering import lowered
from tests.ops.sequence_op import assert_close, tolerance
from tests.ops.transformer_step_test import EPS, make, paged

SMALL = Config(
  qkv_stages=2, o_stages=2, gate_up_stages=2, down_stages=2, attend_splits=2,
  attend_stages=3,
)  # fmt: skip
# Model: layers, D, F, H, N, K.
MODELS = {
  "smollm2-135m": (30, 576, 1536, 9, 3, 64),
  "llama-3.2-1b": (16, 2048, 8192, 32, 8, 64),
  "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128),
}


def arrays(seed=0, **changes):
  sizes = {
    "layers": 1, "width": 128, "heads": 4, "kv_heads": 2, "size": 64,
    "hidden": 64, "slots": 192,
  }  # fmt: skip
  return make(seed, **(sizes | {"dtype": "bfloat16"} | changes))


@pytest.mark.parametrize(
  "config, lengths, changes",
  [
    # The second row has nothing but the new token, which one block takes.
    (SMALL, (130, 0, 191), {"batch": 3}),
    (SMALL, (63,), {"batch": 1, "size": 128, "heads": 3, "kv_heads": 1}),
    # A block with more tiles than stages, and rows that fill no tile.
    (
      dataclasses.replace(SMALL, attend_splits=1, attend_stages=2),
      (150, 64, 1, 127, 128, 5, 190, 33, 66),
      {"batch": 9, "layers": 2, "heads": 2},
    ),
    (None, (100,), {"batch": 1}),
  ],
)
def test_values(config, lengths, changes):
  x, weights, keys, values, _, frequencies = arrays(**changes)
  given = (
    x, weights, keys, values, jnp.asarray(lengths, jnp.int32), frequencies
  )  # fmt: skip
  expected = transformer_step_reference(*given, eps=EPS)
  found = mosaic_gpu.forward(
    *given, eps=EPS, config=config, interpret=plgpu.InterpretGPUParams()
  )
  # Each layer rounds the operands of four products.
  bound = 4 * changes.get("layers", 1) * tolerance("bfloat16", 192)
  assert_close(found, expected, bound)
  for new, old in zip(found[1:], (keys, values)):
    slots = np.arange(old.shape[2])[None] != np.asarray(lengths)[:, None]
    kept = np.asarray(new, np.float32)[:, slots]
    np.testing.assert_array_equal(kept, np.asarray(old, np.float32)[:, slots])


def in_formats(weights, **forms):
  """Weights of which products are in formats, and what these stand for."""
  few = {
    name: jax.jit(jax.vmap(functools.partial(quantize, format=form, axis=-2)))(
      getattr(weights, name)
    )
    for product, form in forms.items()
    for name in MATRICES[product]
  }
  plain = {name: dequantize(w, dtype="float32") for name, w in few.items()}
  return (
    dataclasses.replace(weights, **few), dataclasses.replace(weights, **plain)
  )  # fmt: skip


# Two warpgroups share the chunks of two products.
FEW_BITS = dataclasses.replace(SMALL, qkv_warpgroups=2, gate_up_warpgroups=2)


@pytest.mark.parametrize(
  "forms, changes",
  [
    # A scale a column, and several of it, of two matrices a thread block.
    ({"qkv": "int8:row", "o": "int8:row", "gate_up": "int4:64"}, {}),
    # Heads of two tiles.
    (
      {"qkv": "int4:64", "gate_up": "int4:row", "down": "int4:64"},
      {"size": 128, "heads": 3, "kv_heads": 1},
    ),
  ],
)
def test_weights_of_few_bits(forms, changes):
  x, weights, *caches, _, frequencies = arrays(batch=2, hidden=128, **changes)
  lengths = jnp.asarray([130, 63], jnp.int32)
  weights, exact = in_formats(weights, **forms)
  run = lambda x, weights, *caches: mosaic_gpu.forward(
    x, weights, *caches, lengths, frequencies, eps=EPS, config=FEW_BITS,
    interpret=plgpu.InterpretGPUParams(),
  )  # fmt: skip
  expected = transformer_step_reference(
    x, exact, *caches, lengths, frequencies, eps=EPS
  )
  found = jax.jit(run)(x, weights, *caches)
  assert_close(found, expected, 4 * tolerance("bfloat16", 192))


def test_a_step_that_reads_the_best_pages():
  x, weights, keys, values, _, frequencies = arrays(batch=2, slots=512)
  lengths = jnp.asarray([505, 40], jnp.int32)
  given = x, weights, keys, values, lengths, frequencies
  # All pages, since rounding would decide which of them are the best.
  num_pages = jnp.full((1, 2, 2), 64, jnp.int32)
  pages = paged(keys, lengths, num_pages, page_size=8)
  *found, summary = mosaic_gpu.forward(
    *given, eps=EPS, config=SMALL, pages=pages,
    interpret=plgpu.InterpretGPUParams(),
  )  # fmt: skip
  expected = transformer_step_reference(*given, eps=EPS, pages=pages)
  assert_close(tuple(found), expected, 4 * tolerance("bfloat16", 512))
  behind = paged(found[1], lengths + 1, num_pages, page_size=8)
  assert_close(summary, behind.summary, tolerance("bfloat16", 8))


@pytest.mark.skipif(
  dispatch.needs_wgmma() is not None, reason="runs on a Hopper GPU"
)
@pytest.mark.parametrize(
  "batch, changes",
  [
    (1, {}),
    # Attention by a cluster.
    (1, {"slots": 640}),
    (3, {"size": 128, "heads": 3, "kv_heads": 1}),
    (16, {"heads": 6}),
    (33, {"slots": 256}),
  ],
)
def test_a_gpu_agrees_with_float64(batch, changes):
  sizes = {"layers": 2, "width": 512, "heads": 8, "hidden": 1024, "slots": 2048}
  x, weights, keys, values, _, frequencies = arrays(
    7, batch=batch, **(sizes | changes)
  )
  lengths = np.random.default_rng(0).integers(0, keys.shape[2], batch)
  lengths[0] = keys.shape[2] - 1
  given = (
    x, weights, keys, values, jnp.asarray(lengths, jnp.int32), frequencies
  )  # fmt: skip
  expected = transformer_step_reference(*given, eps=EPS)
  run = functools.partial(
    transformer_step, eps=EPS, implementation="mosaic_gpu"
  )
  found = jax.jit(run, donate_argnums=(2, 3))(*given)
  assert_close(found, expected, 8 * tolerance("bfloat16", 2048))


@pytest.mark.skipif(
  dispatch.needs_wgmma() is not None, reason="runs on a Hopper GPU"
)
@pytest.mark.parametrize(
  "form, batch, changes",
  [
    ("int8:row", 1, {}),
    ("int4:128", 1, {"size": 128, "kv_heads": 4}),
    ("int4:row", 9, {}),
  ],
)
def test_a_gpu_multiplies_by_few_bits(form, batch, changes):
  sizes = {"layers": 2, "width": 512, "heads": 8, "hidden": 1024, "slots": 640}
  x, weights, *caches, _, frequencies = arrays(
    8, batch=batch, **(sizes | changes)
  )
  weights, exact = in_formats(weights, **dict.fromkeys(MATRICES, form))
  lengths = jnp.arange(batch, dtype=jnp.int32) + 600
  expected = transformer_step_reference(
    x, exact, *caches, lengths, frequencies, eps=EPS
  )
  run = functools.partial(
    transformer_step, eps=EPS, implementation="mosaic_gpu"
  )
  found = jax.jit(run, donate_argnums=(2, 3))(
    x, weights, *caches, lengths, frequencies
  )
  assert_close(found, expected, 8 * tolerance("bfloat16", 2048))


def shapes_of(name, batch, slots):
  layers, d, f, heads, kv_heads, k = MODELS[name]
  of = lambda *shape: jax.ShapeDtypeStruct((layers, *shape), jnp.bfloat16)
  weights = TransformerWeights(
    attn_norm=of(d),
    q_proj=of(d, heads * k),
    k_proj=of(d, kv_heads * k),
    v_proj=of(d, kv_heads * k),
    o_proj=of(heads * k, d),
    mlp_norm=of(d),
    gate_proj=of(d, f),
    up_proj=of(d, f),
    down_proj=of(f, d),
  )
  cache = of(batch, slots, kv_heads, k)
  x = jax.ShapeDtypeStruct((batch, 1, d), jnp.bfloat16)
  lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
  frequencies = jax.ShapeDtypeStruct((k // 2,), jnp.float32)
  return x, weights, cache, cache, lengths, frequencies


@pytest.mark.parametrize(
  "name, batch, slots",
  [
    ("smollm2-135m", 1, 640),
    ("llama-3.2-1b", 16, 8320),
    ("llama-3.1-8b", 1, 33024),
  ],
)
def test_lowers_for_hopper(name, batch, slots):
  run = functools.partial(mosaic_gpu.forward, eps=EPS)
  module = lowered(run, *shapes_of(name, batch, slots))
  # Lowered once for all layers but the last, which may differ in donation.
  assert module.count("custom_call @mosaic_gpu_v2") <= 10
  assert module.count("call @layer") == MODELS[name][0]
  # Both caches are written in place.
  assert module.count("output_operand_alias<") >= 2
  for kernel in ("qkv", "attend", "o", "gate_up", "down"):
    assert f"transformer_step_{kernel}" in module


def test_blocks_fit_into_shared_memory():
  for _, d, f, heads, kv_heads, k in MODELS.values():
    for batch in (1, 16, 64):
      rows = mosaic_gpu.padded(batch)
      for slots in (128, 640, 8320, 33024):
        c = mosaic_gpu.configure(batch, d, f, heads, kv_heads, k, slots)
        for name, columns, depth, blocks in (
          ("qkv", k, d, heads + 2 * kv_heads),
          ("o", 64, heads * k, d // 64),
          ("gate_up", 128, d, f // 64),
          ("down", 64, f, d // 64),
        ):
          stages = getattr(c, f"{name}_stages")
          splits = getattr(c, f"{name}_splits")
          assert splits in range(1, 9) and depth % (64 * splits) == 0
          ring = stages * 2 * 64 * (columns + rows)
          sums = 4 * rows * (columns + 4 + (splits - 1) * columns)
          new = 2 * rows * columns if name == "qkv" else 0
          assert stages >= 2
          # Where a multiprocessor has to take two blocks, there is room.
          few = splits <= 2 and splits * blocks <= PROCESSORS
          room = SHARED_MEMORY if few or rows > 32 else SHARED_MEMORY // 2
          assert ring + sums + new + 1024 <= room
        tiles = -(-slots // (64 * c.attend_splits))
        ring = c.attend_stages * 2 * 64 * k
        scores = tiles * 8 * (4 * 68 + 2 * 64)
        merged = 0
        if c.attend_cluster:
          assert 1 < c.attend_splits <= 8
          merged = (c.attend_splits - 1) * 4 * 8 * (k + 128) + 2 * 8 * k
        used = ring + scores + merged + 2 * 8 * k + 4 * 8 * 68 + 1024
        assert used <= SHARED_MEMORY
        assert 1 <= c.attend_splits <= max(slots // 64, 1)


def test_what_the_kernels_do_not_take():
  x, weights, keys, values, lengths, frequencies = arrays(batch=2)
  replace = functools.partial(dataclasses.replace, weights)
  few = lambda w, form: quantize(w, form, axis=-2)
  alone = replace(q_proj=few(weights.q_proj, "int8:row"))
  for changed, message in (
    ({"x": jnp.zeros((2, 2, 128))}, "one token"),
    ({"keys": keys.astype(jnp.float32)}, "keys are float32"),
    ({"keys": keys[:, :, :65], "values": values[:, :, :65]}, "multiples of 64"),
    ({"weights": replace(q_norm=jnp.ones((1, 64)))}, "knows no q_norm"),
    ({"weights": alone}, "q_proj and k_proj and v_proj in one format"),
    ({"weights": replace(o_proj=few(weights.o_proj, "nf4:64"))}, "(o_proj)"),
    ({"keys": keys[..., :32], "values": values[..., :32]}, "heads of 64"),
  ):
    given = {
      "x": x, "weights": weights, "keys": keys, "values": values
    } | changed  # fmt: skip
    assert message in mosaic_gpu.unfit(**given)
  given = x, weights, keys, values, lengths, frequencies
  assert mosaic_gpu.unfit(*given[:4]) is None
  if jax.default_backend() == "cpu":
    with pytest.raises(dispatch.UnsupportedError, match="needs an NVIDIA GPU"):
      transformer_step(*given, eps=EPS, implementation="mosaic_gpu")
