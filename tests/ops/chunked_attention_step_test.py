"""The decoding step of attention over chunks, by XLA and by its kernel.

The kernel is interpreted and lowered on a CPU, and runs on a Hopper GPU.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.chunked_attention import (
  chunked_attention_step,
  chunked_attention_step_reference,
  mosaic_gpu_step,
)
from ops.chunked_attention.mosaic_gpu_step import Config
from ops.hopper import SHARED_MEMORY
from ops.hopper_attention import OF_TILE
from tests.hopper_lowering import lowered
from tests.ops.chunked_attention_test import draw
from tests.ops.sequence_op import assert_close, tolerance


def shapes_of(layers, batch, heads, size, slots):
  h, n = heads
  found = [(batch, h, size), *[(batch, n, size)] * 2]
  return found + [(layers, batch, x, n, size) for x in slots for _ in range(2)]


def make(
  dtype="float32", *, layers=2, batch=3, heads=(4, 2), size=8, slots=(9, 5),
  seen=((9, 3, 0), (5, 2, 0)),
):  # fmt: skip
  """Arguments of the op, of layer 1."""
  shapes = shapes_of(layers, batch, heads, size, slots)
  found = [draw(*x, dtype=dtype, seed=i) for i, x in enumerate(shapes)]
  counts = (jnp.asarray(x, jnp.int32) for x in seen)
  return *found, jnp.int32(layers - 1), *counts


def exact(arrays, **options):
  wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays[:7]]
  return chunked_attention_step_reference(
    *wide, int(arrays[7]), *map(np.asarray, arrays[8:]), **options
  )


@pytest.mark.parametrize(
  "slots, seen, scale",
  [
    ((9, 5), ((9, 3, 0), (5, 2, 0)), None),
    # No window.
    ((9, 0), ((9, 3, 0), (0, 0, 0)), 0.5),
  ],
)
def test_xla(slots, seen, scale):
  arrays = make(slots=slots, seen=seen)
  found = jax.jit(functools.partial(chunked_attention_step, scale=scale))(
    *arrays
  )
  limit = tolerance("float32", sum(slots) + 8)
  assert_close(found, exact(arrays, scale=scale), limit)


@pytest.mark.parametrize(
  "changes, config",
  [
    # Tiles that reach beyond their slots, a row that sees nothing but itself,
    # and more splits than another has tiles.
    (
      {"slots": (150, 37), "seen": ((150, 3, 0), (37, 8, 0))},
      Config(splits=2, stages=2),
    ),
    # No window, wider heads, one query a key.
    (
      {
        "slots": (70, 0), "size": 128, "heads": (2, 2), "batch": 2,
        "seen": ((66, 64), (0, 0)),
      },
      Config(splits=3, stages=2),
    ),
  ],
)  # fmt: skip
def test_kernel(changes, config):
  arrays = make(**{"dtype": "bfloat16", "size": 64} | changes)
  found = mosaic_gpu_step.forward(
    *arrays, scale=0.2, config=config, interpret=plgpu.InterpretGPUParams()
  )
  assert found.dtype == jnp.bfloat16
  limit = tolerance("bfloat16", sum(changes["slots"]) + 64)
  assert_close(found, exact(arrays, scale=0.2), limit)


@pytest.mark.skipif(
  dispatch.needs_wgmma() is not None, reason="runs on a Hopper GPU"
)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
  "batch, slots", [(1, (2065, 32)), (3, (1025, 64)), (2, (8193, 5))]
)
def test_a_gpu_agrees_with_float64(batch, slots, size):
  seen = np.random.default_rng(0).integers(0, slots, (batch, 2)).T
  seen[:, 0] = slots
  arrays = make(
    "bfloat16", batch=batch, heads=(8, 8), size=size, slots=slots, seen=seen
  )
  run = functools.partial(chunked_attention_step, implementation="mosaic_gpu")
  found = jax.jit(run)(*arrays)
  assert_close(found, exact(arrays), tolerance("bfloat16", sum(slots) + size))


@pytest.mark.parametrize(
  "heads, size, batch, slots",
  [((8, 8), 64, 16, (8209, 32)), ((32, 8), 128, 1, (1033, 64))],
)
def test_lowers_for_hopper(heads, size, batch, slots):
  of = jax.ShapeDtypeStruct
  shapes = shapes_of(2, batch, heads, size, slots)
  arrays = [of(shape, jnp.bfloat16) for shape in shapes]
  ints = [of(shape, jnp.int32) for shape in ((), (batch,), (batch,))]
  run = functools.partial(mosaic_gpu_step.forward, scale=0.1)
  module = lowered(run, *arrays, *ints)
  assert module.count("custom_call @mosaic_gpu_v2") == 1
  assert mosaic_gpu_step.NAME in module


def test_blocks_fit_into_shared_memory():
  for heads, size in ((8, 64), (8, 128), (3, 64), (1, 128)):
    for batch in (1, 4, 16, 64):
      for chunks in (1, 65, 1025, 8193, 32769):
        c = mosaic_gpu_step.configure(batch, heads, size, chunks, 64)
        tiles = -(-(-(-chunks // 64) + 1) // c.splits)
        ring = c.stages * 2 * 64 * size
        rest = 2 * 8 * size + 4 * 8 * 68 + 1024 + 2048
        assert ring + tiles * OF_TILE + rest <= SHARED_MEMORY
        assert c.stages >= 2 and 1 <= c.splits <= -(-chunks // 64) + 1


def test_what_does_not_fit():
  arrays = make()
  with pytest.raises(ValueError, match="ring_v is"):
    chunked_attention_step(*arrays[:6], arrays[6][:, :, 1:], *arrays[7:])
  with pytest.raises(ValueError, match="3 query heads for 2 key heads"):
    chunked_attention_step(arrays[0][:, :3], *arrays[1:])
  with pytest.raises(ValueError, match="are not"):
    chunked_attention_step(arrays[0][0], *arrays[1:])
  with pytest.raises(ValueError, match="needs bfloat16, q is float32"):
    mosaic_gpu_step.forward(*arrays, scale=1.0)
  narrow, none = make("bfloat16"), make("bfloat16", size=64, slots=(0, 0))
  assert "heads of 64" in mosaic_gpu_step.unfit(*narrow[:7])
  assert "a slot" in mosaic_gpu_step.unfit(*none[:7])
  if jax.default_backend() == "cpu":
    with pytest.raises(dispatch.UnsupportedError, match="needs an NVIDIA GPU"):
      chunked_attention_step(*arrays, implementation="mosaic_gpu")
