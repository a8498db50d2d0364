"""The kernel of a whole step of `mamba2_step`, interpreted and lowered."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dequantize, dispatch
from ops.mamba2_step import (
  mamba2_step_reference,
  mosaic_gpu,
  mosaic_gpu_ring,
  mosaic_gpu_whole,
)
from ops.mamba2_step.mosaic_gpu_whole_step import Config
from ops.quantized import formats, state
from tests.hopper_lowering import lowered
from tests.ops.mamba2_step_gpu_test import SHAPES, arrays, in_format
from tests.ops.mamba2_step_test import EPS
from tests.ops.sequence_op import assert_close, tolerance

# The interpreter takes a block after the other, and each is slow.
SMALL = {"blocks": 2, "warpgroups": 1, "stages": 2}


def quantized(seed, form, state_form=None, **changes):
  x, weights, conv, ssm = arrays(seed, width=256, **changes)
  weights = in_format(weights, form, form)
  if state_form:
    empty = state.zeros(ssm.shape, formats.get(state_form), jnp.float32)
    ssm = jax.vmap(lambda old, new: old.write(new))(empty, ssm)
  return x, weights, conv, ssm


@pytest.mark.parametrize(
  "form, config, changes",
  [
    # One row, whose stream is in two parts; chunks asked for two at a time.
    ("int4:128", Config(splits=2, **SMALL), {"batch": 1}),
    ("int8:row", Config(segment=2, **SMALL), {"batch": 1, "taps": 3}),
    # Segments that are one copy, and of the row that there is; the factor of
    # one norm after the product, factors of several before it.
    (
      "int4:128",
      Config(splits=2, segment=2, joined=True, lean=True, **SMALL),
      {"batch": 1},
    ),
    (
      "int8:row",
      Config(joined=True, lean=True, **SMALL),
      {"batch": 1, "groups": 2, "heads": 16, "layers": 1},
    ),
    # Groups of the gated norm, each with a factor; some rows of eight.
    ("int8:128", Config(**SMALL), {"batch": 3, "groups": 2, "heads": 16}),
  ],
)
def test_values(form, config, changes):
  x, weights, *states = quantized(0, form, **{"layers": 2, **changes})
  plain = lambda w: dequantize(w, dtype="float32")
  exact = dataclasses.replace(
    weights, in_proj=plain(weights.in_proj), out_proj=plain(weights.out_proj)
  )
  step = functools.partial(
    mosaic_gpu_whole.forward,
    eps=EPS,
    config=config,
    interpret=plgpu.InterpretGPUParams(),
  )
  found = jax.jit(step)(x, weights, *states)
  expected = mamba2_step_reference(x, exact, *states, eps=EPS)
  # Two layers, each of which rounds to bfloat16.
  bound = 2 * tolerance("bfloat16", weights.out_proj.shape[1])
  assert_close(found, expected, bound)


def test_state_in_int8():
  """It is stepped as the state that it stands for, and rounded once."""
  x, weights, conv, kept = quantized(1, "int4:128", "int8:row", layers=1)
  step = functools.partial(
    mosaic_gpu_whole.forward,
    eps=EPS,
    config=Config(**SMALL),
    interpret=plgpu.InterpretGPUParams(),
  )
  found = jax.jit(step)(x, weights, conv, kept)
  floats = jax.jit(step)(x, weights, conv, kept.read())
  for one, other in zip(found[:2], floats[:2]):
    assert_close(one, other, tolerance("bfloat16", 8))
  expected = jax.vmap(lambda old, new: old.write(new))(kept, floats[2]).tensor
  levels = [np.asarray(t.values, int) for t in (found[2].tensor, expected)]
  # What lies between two levels may fall to either.
  assert np.abs(levels[0] - levels[1]).max() <= 1
  assert np.mean(levels[0] != levels[1]) < 1e-3


def model(name, batch, form, state_form):
  """Shapes of a published model's arrays."""
  layers, width, heads, groups, size = SHAPES[name]

  def make():
    sizes = {"width": width, "heads": heads, "groups": groups, "state": size}
    x, weights, conv, ssm = arrays(
      layers=1, batch=batch, shapes_only=True, **sizes
    )
    weights = in_format(weights, form, form)
    if state_form:
      ssm = state.zeros(ssm.shape, formats.get(state_form), jnp.float32)
    return x, weights, conv, ssm

  x, *stacks = jax.eval_shape(make)
  whole = lambda v: jax.ShapeDtypeStruct((layers, *v.shape[1:]), v.dtype)
  return x, *jax.tree.map(whole, stacks)


@pytest.mark.parametrize(
  "name, batch, form, state_form",
  [
    ("mamba2-130m", 2, "int8:row", None),
    ("mamba2-2.7b", 1, "int4:128", "int8:row"),
    ("mamba2-8b", 1, "int4:128", None),
  ],
)
def test_lowers_for_hopper(name, batch, form, state_form):
  shapes = model(name, batch, form, state_form)
  forward = functools.partial(mosaic_gpu_whole.forward, eps=EPS)
  module = lowered(forward, *shapes)
  # One kernel for all layers, which writes both states in place.
  assert module.count("call @mosaic_gpu_v2") == 1
  assert module.count("output_operand_alias<") >= 2


def test_one_row_takes_the_whole_kernel(monkeypatch):
  shapes = model("mamba2-2.7b", 1, "int4:128", None)

  def kernels():
    # A function of its own, which no trace is kept of.
    forward = lambda *arrays: mosaic_gpu.forward(*arrays, eps=EPS)
    return lowered(forward, *shapes).count("call @mosaic_gpu_v2")

  assert kernels() > 1
  gpu = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H200", num_cores=132, platform="gpu"
  )
  monkeypatch.setattr(dispatch, "device", lambda: gpu)
  assert kernels() == 1
  # Blocks that do not run at once would wait for each other forever.
  few = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 PCIe", num_cores=114, platform="gpu"
  )
  monkeypatch.setattr(dispatch, "device", lambda: few)
  assert kernels() > 1


def held(layout, shape):
  """What each lane of the first warp holds: (lanes, registers, vector)."""
  elements = np.arange(np.prod(shape)).reshape(shape)
  for tile in layout.tiling.tiles:
    split, count = elements.shape, len(tile)
    outer = [n // t for n, t in zip(split[-count:], tile)]
    pairs = [n for pair in zip(outer, tile) for n in pair]
    elements = elements.reshape(*split[:-count], *pairs)
    first = elements.ndim - 2 * count
    order = [
      *range(first, elements.ndim, 2),
      *range(first + 1, elements.ndim, 2),
    ]
    elements = elements.transpose(*range(first), *order)
  own = [d % elements.ndim for d in (*layout.warp_dims, *layout.lane_dims)]
  rest = [d for d in range(elements.ndim) if d not in own]
  elements = elements.transpose(*own, *rest)
  elements = elements[0] if elements.shape[0] else elements
  return elements.reshape(32, -1, elements.shape[-1])


@pytest.mark.parametrize("packed", [False, True])
def test_levels_meet_what_they_multiply(packed):
  """Both operands call the same number of a chunk by the same name."""
  chunk, rows, tile = mosaic_gpu_ring.CHUNK, 8, 64
  wgmma = plgpu.Layout.WGMMA
  kept = plgpu.Layout.WGMMA_UPCAST_2X
  if packed:
    kept = plgpu.Layout.WGMMA_UPCAST_4X
  words = held(kept.to_mgpu(), (tile, chunk)) % chunk
  # By columns, and by the half of 16 rows.
  words = words.reshape(32, -1, 2, words.shape[-1])
  pairs = [(i, i + 4) for i in range(4)] if packed else [(0, 1), (2, 3)]
  found = np.stack([words[..., pair] for pair in pairs], axis=2)
  called = held(wgmma.to_mgpu(), (tile, chunk)) % chunk
  names = np.full(chunk, -1)
  names[called.reshape(-1)] = found.reshape(-1)
  np.testing.assert_array_equal(names[called.reshape(-1)], found.reshape(-1))
  assert sorted(names) == list(range(chunk))

  loaded, stored = (
    held(layout.to_mgpu(), (rows, chunk)) % chunk
    for layout in mosaic_gpu_ring.batch_layouts(packed)
  )
  if packed:
    # Both numbers of a pair are registers of their own.
    loaded = loaded.reshape(32, -1, 2, 1)
  np.testing.assert_array_equal(names[stored.reshape(-1)], loaded.reshape(-1))
  # A number of the only row is loaded by the thread of its place.
  row = held(mosaic_gpu_ring.row_layout(packed).to_mgpu(), (chunk,)) % chunk
  np.testing.assert_array_equal(row.reshape(-1), names[:32])


def test_configurations_that_do_not_fit():
  lean = Config(lean=True, **SMALL)
  with pytest.raises(ValueError, match="one row"):
    mosaic_gpu_whole.forward(*quantized(3, "int8:row"), eps=EPS, config=lean)
  part = mosaic_gpu_ring.Part(depth=512, width=64, groups=2)
  with pytest.raises(ValueError, match="joined"):
    mosaic_gpu_ring.Ring(
      parts=(part,), packed=True, blocks=1, warpgroups=1, teams=1, segment=2,
      stages=2, joined=True, interpret=True,
    )  # fmt: skip


def test_configurations():
  for batch in (1, 2, 8):
    for bits in (4, 8):
      for width in (768, 2560, 4096):
        config = mosaic_gpu_whole.configure(batch, width, 2 * width, bits)
        if config is None:
          continue
        members = config.warpgroups // config.teams
        chunks = (
          width // mosaic_gpu_ring.CHUNK,
          2 * width // mosaic_gpu_ring.CHUNK // config.splits,
        )
        assert all(n % (members * config.segment) == 0 for n in chunks)
        assert config.warpgroups * config.stages <= 32
  one = mosaic_gpu_whole.configure(1, 2560, 5120, 4)
  assert one.splits == 4 and one.lean and one.joined
  assert (one.teams, one.segment, one.stages) == (2, 5, 2)
  apart = mosaic_gpu_whole.configure(1, 2560, 5120, 4, scaled=False)
  assert apart.lean and not apart.joined
  assert not mosaic_gpu_whole.configure(1, 2560, 5120, 8).lean
  assert not mosaic_gpu_whole.configure(1, 4096, 8192, 4, groups=8).lean
  assert mosaic_gpu_whole.configure(8, 2560, 5120, 4).splits == 1
  # Not even two chunks of a warpgroup lie beside eight rows so wide.
  assert mosaic_gpu_whole.configure(8, 8192, 16384, 8) is None


def test_reasons():
  x, weights, conv, ssm = quantized(2, "int4:128")
  unfit = mosaic_gpu_whole.unfit
  assert unfit(x, weights, ssm) is None
  assert "rows" in unfit(jnp.zeros((9, 256)), weights, ssm)
  half = dataclasses.replace(weights, in_proj=arrays(2, width=256)[1].in_proj)
  assert "number format" in unfit(x, half, ssm)
  mixed = in_format(arrays(2, width=256)[1], "int4:128", "int8:128")
  assert "as many bits" in unfit(x, mixed, ssm)
  narrow = in_format(arrays(2, width=256)[1], "int4:64", "int4:64")
  assert "multiple of 128" in unfit(x, narrow, ssm)
