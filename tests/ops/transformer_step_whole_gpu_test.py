"""The kernel of a whole step of `transformer_step`, interpreted and lowered."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.hopper import SHARED_MEMORY
from ops.transformer_step import (
  api,
  mosaic_gpu_whole,
  transformer_step,
  transformer_step_reference,
)
from ops.transformer_step.mosaic_gpu_whole_step import Config
from tests.hopper_lowering import lowered
from tests.ops.sequence_op import assert_close, tolerance
from tests.ops.transformer_step_gpu_test import MODELS, arrays, shapes_of
from tests.ops.transformer_step_test import EPS

# The interpreter takes a block after the other, and each is slow.
SMALL = Config(blocks=8, warpgroups=2, stages=3)
SPLIT = dataclasses.replace(
  SMALL, qkv_splits=2, qkv_per=2, attend_splits=3, o_splits=2, down_splits=2,
  gate_up_per=2,
)  # fmt: skip


@pytest.mark.parametrize(
  "config, length, changes",
  [
    (SPLIT, 130, {"hidden": 256}),
    (dataclasses.replace(SMALL, o_per=2, down_per=2), 0, {"layers": 1}),
    (
      dataclasses.replace(
        SMALL, blocks=5, warpgroups=1, attend_splits=2, qkv_per=2
      ),
      191,
      {"size": 128, "heads": 3, "kv_heads": 1, "layers": 1},
    ),
  ],
)
def test_values(config, length, changes):
  sizes = {"layers": 2, "batch": 1}
  x, weights, keys, values, _, frequencies = arrays(**(sizes | changes))
  lengths = jnp.asarray([length], jnp.int32)
  given = x, weights, keys, values, lengths, frequencies
  expected = transformer_step_reference(*given, eps=EPS)
  step = functools.partial(
    mosaic_gpu_whole.forward,
    eps=EPS,
    config=config,
    interpret=plgpu.InterpretGPUParams(),
  )
  found = jax.jit(step)(*given)
  bound = 4 * keys.shape[0] * tolerance("bfloat16", 192)
  assert_close(found, expected, bound)
  for new, old in zip(found[1:], (keys, values)):
    kept = np.arange(old.shape[2]) != length
    np.testing.assert_array_equal(
      np.asarray(new, np.float32)[:, :, kept],
      np.asarray(old, np.float32)[:, :, kept],
    )


def test_small_layers_alone_are_taken_through_one_kernel():
  for name, is_small in (
    ("smollm2-135m", True), ("llama-3.2-1b", True), ("llama-3.1-8b", False)
  ):  # fmt: skip
    _, weights, *_ = shapes_of(name, 1, 640)
    assert (api._bytes_of_a_layer(weights) < api._ONE_KERNEL) == is_small


@pytest.mark.parametrize("name, slots", [("smollm2-135m", 640)])
def test_lowers_for_hopper(name, slots):
  run = functools.partial(mosaic_gpu_whole.forward, eps=EPS)
  module = lowered(run, *shapes_of(name, 1, slots))
  # One kernel for all layers, which writes both caches in place.
  assert module.count("call @mosaic_gpu_v2") == 1
  assert module.count("output_operand_alias<") >= 2


def test_units_fit():
  for _, d, f, heads, kv_heads, k in MODELS.values():
    for slots in (128, 640, 8320, 33024):
      sizes = mosaic_gpu_whole.Sizes(d, f, heads, kv_heads, k, slots)
      for warpgroups in (2, 3, 4):
        config = mosaic_gpu_whole.configure(sizes, warpgroups)
        step = mosaic_gpu_whole.Step(
          config=config, sizes=sizes, phases=mosaic_gpu_whole.PHASES, eps=EPS,
          interpret=False,
        )  # fmt: skip
        for part in step.parts.values():
          assert 1 <= part.units <= config.blocks
        used = 0
        for one in step.scratch().values():
          if not isinstance(one, plgpu.Barrier):
            used += np.prod(one.shape) * jnp.dtype(one.dtype).itemsize
        assert config.stages >= 2 and used + 2048 <= SHARED_MEMORY


@pytest.mark.skipif(
  dispatch.needs_wgmma() is not None, reason="runs on a Hopper GPU"
)
@pytest.mark.parametrize(
  "changes", [{}, {"size": 128, "heads": 3, "kv_heads": 1, "slots": 2048}]
)
def test_a_gpu_agrees_with_float64(changes):
  sizes = {"layers": 2, "width": 512, "heads": 8, "hidden": 1024, "slots": 640}
  x, weights, keys, values, _, frequencies = arrays(
    7, batch=1, **(sizes | changes)
  )
  lengths = jnp.asarray([keys.shape[2] - 1], jnp.int32)
  given = x, weights, keys, values, lengths, frequencies
  expected = transformer_step_reference(*given, eps=EPS)
  run = functools.partial(
    transformer_step, eps=EPS, implementation="mosaic_gpu_whole"
  )
  # Twice, since a call has to leave its counters as the next one wants them.
  for _ in range(2):
    found = jax.jit(run)(*given)
    assert_close(found, expected, 8 * tolerance("bfloat16", 2048))


def test_what_the_kernel_does_not_take():
  x, weights, *caches, _, _ = arrays(batch=2)
  message = mosaic_gpu_whole.unfit(x, weights, caches[0])
  assert "needs one row" in message
  with pytest.raises(ValueError, match="8 units, but there are 4 blocks"):
    mosaic_gpu_whole.Step(
      config=dataclasses.replace(SMALL, blocks=4),
      sizes=mosaic_gpu_whole.Sizes(128, 64, 4, 2, 64, 192),
      phases=mosaic_gpu_whole.PHASES,
      eps=EPS,
      interpret=True,
    )
