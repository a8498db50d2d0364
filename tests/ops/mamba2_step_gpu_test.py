"""The GPU kernels of `mamba2_step`, interpreted and lowered on a CPU."""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from models import mamba
from models.implementations import Implementations
from models.mamba_config import AttentionLayers, MambaConfig
from ops import dequantize, dispatch, quantize
from ops.mamba2_step import (
  api,
  mamba2_step_reference,
  mosaic_gpu,
  mosaic_gpu_product,
  mosaic_gpu_tiles,
)
from ops.mamba2_step.mosaic_gpu import Config
from ops.quantized import QWeight, formats, is_quantized, state
from tests.hopper_lowering import lowered
from tests.ops.mamba2_step_test import EPS, compare, int8, make
from tests.ops.sequence_op import assert_close, tolerance

SMALL = Config(in_stages=2, out_stages=3)
# Model: layers, width, heads, groups, states.
SHAPES = {
  "mamba2-130m": (24, 768, 24, 1, 128),
  "mamba2-2.7b": (64, 2560, 80, 1, 128),
  "mamba2-8b": (4, 4096, 128, 8, 128),
}
interpreted = functools.partial(
  mosaic_gpu.forward, interpret=plgpu.InterpretGPUParams()
)


def arrays(seed=0, **changes):
  sizes = {"width": 128, "heads": 8, "channels": 64, "groups": 1, "state": 64}
  return make(seed, **(sizes | {"dtype": "bfloat16"} | changes))


@pytest.mark.parametrize(
  "config, tokens, changes",
  [
    (None, 2, {"batch": 3, "layers": 1}),
    (SMALL, 1, {"batch": 1, "state": 128, "layers": 1}),
    (SMALL, 1, {"batch": 16, "taps": 3, "layers": 1}),
    (Config(in_columns=128, out_columns=128), 1, {"batch": 9, "groups": 2}),
  ],
)
def test_values(config, tokens, changes):
  compare(
    functools.partial(interpreted, config=config), arrays(**changes), tokens
  )


def test_other_layers_are_left_alone():
  x, weights, conv, ssm = arrays(1, layers=3, batch=2)
  padded = jnp.pad(x, ((0, 6), (0, 0)))
  residual = mosaic_gpu.Residual.of(padded, weights.norm[1], SMALL)
  params = plgpu.InterpretGPUParams()
  kernels, weights = mosaic_gpu.prepare(SMALL, weights, 8, 1, params)
  run = functools.partial(mosaic_gpu.layer, SMALL, EPS, params, kernels)
  _, new_conv, new_ssm = run(
    jnp.ones((1,), jnp.int32), residual, weights, conv, ssm
  )
  for old, new in ((conv, new_conv), (ssm, new_ssm)):
    old, new = np.asarray(old), np.asarray(new)
    for index in (0, 2):
      np.testing.assert_array_equal(new[index], old[index])
    assert np.all(np.any(new[1] != old[1], axis=-1))


def test_shares_of_the_rows_add_up():
  # The interpreter knows no clusters' memory, so here the sums are added later.
  rows, depth, width = 8, 256, 96
  rng = np.random.default_rng(0)
  x, w = (
    jnp.asarray(rng.integers(-4, 5, shape), "bfloat16")
    for shape in ((rows, depth), (2, depth, width))
  )
  matmul = mosaic_gpu_product.Product(
    rows, depth, 64, stages=2, splits=2, parts=2, interpret=True
  )

  def kernel(x_ref, w_ref, out_ref, **s):
    column = jax.lax.axis_index("columns") * 64
    split = jax.lax.axis_index("split")
    # The second part counts twice.
    factors = [jnp.full((rows,), factor, jnp.float32) for factor in (1.0, 2.0)]

    def finish(value, _):
      out_ref[split, :, pl.ds(column, 64)] = value

    matmul.run(
      x_ref, [w_ref], column, s,
      prefix=(1,), split=split, prepare=lambda _: (None, factors),
      finish=finish,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((2, rows, 128), jnp.float32),
    grid=(2, 2),
    grid_names=("columns", "split"),
    scratch_types=matmul.scratch(),
    interpret=plgpu.InterpretGPUParams(),
  )
  found = run(x, *matmul.operands(w))[..., :width]
  x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
  for half in range(2):
    first, second = (
      x[:, own] @ w[1, own]
      for own in (slice(k * 64, (k + 1) * 64) for k in (2 * half, 2 * half + 1))
    )
    np.testing.assert_array_equal(found[half], first + 2 * second)


def test_warpgroups_with_columns_of_their_own_share_the_depth():
  rows, depth, width, groups = 8, 640, 96, 10
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(-4, 5, (rows, depth)), "bfloat16")
  levels = rng.integers(-7, 8, (width, depth))
  scales = rng.integers(1, 5, (width, groups)).astype("float32")
  matmul = mosaic_gpu_tiles.Product(
    rows=rows, depth=depth, groups=groups, packed=False, warpgroups=2, tiles=2,
    stages=2, splits=2, interpret=True,
  )  # fmt: skip

  def kernel(x_ref, *refs, **s):
    *refs, out_ref = refs
    split = jax.lax.axis_index("split")
    own = pl.ds(jax.lax.axis_index("warpgroup") * 64, 64)

    def finish(value, _):
      out_ref[split, :, own] = value

    matmul.run(
      x_ref, refs, 0, s,
      split=split, prepare=lambda _: (None, ()), finish=finish,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((2, rows, 128), jnp.float32),
    grid=(2,),
    grid_names=("split",),
    **matmul.launch(),
    scratch_types=matmul.scratch(),
    interpret=plgpu.InterpretGPUParams(),
  )
  w = jnp.asarray(levels, "int8")
  found = run(x, *matmul.operands(w, jnp.asarray(scales), 128))[..., :width]
  exact = levels * np.repeat(scales, depth // groups, axis=1)
  x, half = np.asarray(x, np.float64), depth // 2
  for k, own in enumerate((slice(half), slice(half, depth))):
    np.testing.assert_array_equal(found[k], x[:, own] @ exact[:, own].T)


def test_blocks_of_a_cluster_finish_every_row_once():
  product = functools.partial(
    mosaic_gpu_tiles.Product,
    rows=64, depth=512, groups=1, packed=True, warpgroups=2, tiles=2, stages=2,
  )  # fmt: skip
  for splits in (1, 2, 4):
    one = product(splits=splits, exchange=splits > 1)
    rows = [one.own_rows(0, split) for split in range(splits)]
    assert {r.size for r in rows} == {one.finished[0]}
    assert [r.start + k for r in rows for k in range(r.size)] == list(range(64))
  with pytest.raises(ValueError, match="4 blocks do not share 16 rows"):
    product(rows=16, splits=4, exchange=True)


def in_format(weights, form_in, form_out):
  """Weights of which the projections are in number formats."""

  def packed(w, form):
    if form is None:
      return w
    run = functools.partial(quantize, format=form, axis=-2)
    return jax.jit(jax.vmap(run))(w)

  return dataclasses.replace(
    weights,
    in_proj=packed(weights.in_proj, form_in),
    out_proj=packed(weights.out_proj, form_out),
  )


@pytest.mark.parametrize(
  "forms, config, changes",
  [
    (("int4:64", "int4:128"), None, {"batch": 3}),
    # A scale a column; two warpgroups without and one with the other weights.
    (
      ("int8:row", None),
      Config(in_stages=2, in_warpgroups=2, out_stages=3),
      {"batch": 1, "state": 128},
    ),
    # The groups of a norm, each with a factor.
    (
      ("int8:64", "int4:64"),
      Config(
        in_columns=128,
        out_columns=128,
        in_stages=2,
        out_stages=2,
        out_warpgroups=2,
      ),
      {"batch": 9, "groups": 2},
    ),
    # Two warpgroups share the rows that are summed over.
    (
      ("int8:row", "int4:row"),
      Config(
        in_stages=2,
        in_warpgroups=2,
        out_stages=2,
        out_warpgroups=2,
      ),
      {"batch": 9},
    ),
    # Each warpgroup has 64 columns, of which the last ones are no more.
    (
      ("int8:row", "int4:128"),
      Config(
        in_stages=2,
        in_warpgroups=4,
        out_stages=2,
        out_warpgroups=3,
        own_tiles=True,
      ),
      {"batch": 9},
    ),
  ],
)
def test_weights_of_few_bits(forms, config, changes):
  x, weights, *states = arrays(layers=1, **changes)
  weights = in_format(weights, *forms)
  plain = lambda w: dequantize(w, dtype="float32") if is_quantized(w) else w
  exact = dataclasses.replace(
    weights, in_proj=plain(weights.in_proj), out_proj=plain(weights.out_proj)
  )
  step = jax.jit(functools.partial(interpreted, eps=EPS, config=config))
  expected = mamba2_step_reference(x, exact, *states, eps=EPS)
  bound = tolerance("bfloat16", weights.out_proj.shape[1])
  assert_close(step(x, weights, *states), expected, bound)


@pytest.mark.parametrize(
  "scale_dtype, changes",
  [
    ("float32", {}),
    # Blocks and warpgroups with several rows and heads, the last with fewer.
    ("bfloat16", {"state_blocks": 3, "state_stages": 2}),
    ("float32", {"state_blocks": 1, "state_warpgroups": 3}),
    ("float32", {"state_blocks": 3, "state_stages": 2, "state_levels": True}),
  ],
)
def test_state_in_int8(scale_dtype, changes):
  """It is stepped as the state that it stands for, and rounded once."""
  x, weights, conv, ssm = arrays(3, layers=1, batch=2)
  form = dataclasses.replace(formats.get("int8:row"), scale_dtype=scale_dtype)
  empty = state.zeros(ssm.shape, form, jnp.float32)
  write = lambda x: jax.vmap(lambda old, x: old.write(x))(empty, x)
  kept = write(ssm.at[0, 0, 0, 0].set(0.0))
  config = dataclasses.replace(SMALL, **changes)
  run = functools.partial(interpreted, eps=EPS, config=config)
  found = run(x, weights, conv, kept)
  floats = run(x, weights, conv, kept.read())
  # A level times a step and a decay are rounded once, not twice.
  bound = tolerance("bfloat16", weights.out_proj.shape[1])
  assert_close(found[0], floats[0], bound)
  np.testing.assert_array_equal(found[1], floats[1])
  expected = write(floats[2]).tensor
  scales = found[2].tensor.scales, expected.scales
  assert_close(*scales, tolerance(scale_dtype, 1))
  levels = [np.asarray(t.values, int) for t in (found[2].tensor, expected)]
  # What lies between two levels may fall to either.
  assert np.abs(levels[0] - levels[1]).max() <= 1
  assert np.mean(levels[0] != levels[1]) < 1e-3


def lowered_model(
  name, batch, forms=(), state_form=None, own_tiles=False, **changes
) -> str:
  layers, width, heads, groups, size = SHAPES[name]

  def make_one():
    x, weights, conv, ssm = arrays(
      layers=1,
      batch=batch,
      width=width,
      heads=heads,
      groups=groups,
      state=size,
      shapes_only=True,
    )
    if forms:
      weights = in_format(weights, *forms)
    if state_form:
      ssm = state.zeros(ssm.shape, formats.get(state_form), jnp.float32)
    return x, weights, conv, ssm

  x, *stacks = jax.eval_shape(make_one)
  stacks = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct((layers, *v.shape[1:]), v.dtype), stacks
  )
  config = mosaic_gpu.configure(
    batch, width, 4 * width + 2 * groups * size + heads, 2 * width, groups,
    size,
  )  # fmt: skip
  config = mosaic_gpu.configure_few_bits(
    config, batch, groups, stacks[0], stacks[2], own_tiles=own_tiles
  )
  assert config.own_tiles == own_tiles
  forward = functools.partial(
    mosaic_gpu.forward, eps=EPS, config=dataclasses.replace(config, **changes)
  )
  return lowered(forward, x, *stacks)


@pytest.mark.parametrize(
  "name, batch, changes",
  [
    ("mamba2-130m", 1, {}),
    ("mamba2-130m", 64, {"overlap": True}),
    ("mamba2-2.7b", 1, {}),
    ("mamba2-2.7b", 64, {}),
    (
      "mamba2-2.7b",
      8,
      {
        "in_columns": 128,
        "in_stages": 4,
        "out_columns": 128,
        "out_stages": 8,
      },
    ),
    ("mamba2-8b", 3, {}),
    ("mamba2-130m", 1, {"forms": ("int4:128", "int4:128")}),
    ("mamba2-2.7b", 1, {"forms": ("int4:128", "int4:128")}),
    (
      "mamba2-2.7b",
      64,
      {"forms": ("int4:128", "int8:row"), "state_form": "int8:row"},
    ),
    ("mamba2-8b", 64, {"state_form": "int8:row", "state_levels": False}),
    (
      "mamba2-2.7b",
      64,
      {
        "forms": ("int4:128", "int4:128"),
        "state_form": "int8:row",
        "own_tiles": True,
      },
    ),
    ("mamba2-8b", 16, {"forms": ("int8:row", "int4:128")}),
  ],
)
def test_lowers_for_hopper(name, batch, changes):
  module = lowered_model(name, batch, **changes)
  # Lowered once for all layers but the last, which may differ in donation.
  assert module.count("custom_call @mosaic_gpu_v2") <= 6
  assert module.count("call @layer") == SHAPES[name][0]
  # Both states are written in place.
  assert module.count("output_operand_alias<") >= 2
  for kernel in ("mamba2_step_in", "mamba2_step_state", "mamba2_step_out"):
    assert kernel in module


def test_configurations():
  choose = mosaic_gpu.configure
  one = choose(1, 2560, 10576, 5120, 1, 128)
  many = choose(64, 2560, 10576, 5120, 1, 128)
  # Of 132 multiprocessors, two blocks each share 160 blocks, one each 80.
  for config, rows, splits, each in ((one, 8, 4, 2), (many, 64, 2, 1)):
    assert config.out_splits == splits
    stage, tile = 2 * 64 * (64 + rows), 64 * rows
    used = config.out_stages * stage + 4 * tile * config.out_splits
    assert 2**17 / each < used < 227 * 1024 / each
    used = config.in_stages * stage + (4 + 3 * 2) * tile
    assert 2**16 < used < 113 * 1024
  # The states of a large batch leave memory no time for anything else.
  assert one.out_prefetch and not many.out_prefetch
  assert choose(1, 4096, 18560, 8192, 8, 128).out_splits == 1
  assert choose(1, 128, 1160, 512, 1, 64).out_stages >= 2
  tiles = functools.partial(mosaic_gpu_tiles.configure, rows=64, bits=4)
  found = tiles(depth=2560, width=10576, groups=20, beside=6)
  assert found == (3, 2, 4)
  assert tiles(depth=5120, width=2560, groups=40) == (2, 4, 6)
  # More columns than all blocks together have at a time.
  assert tiles(depth=384, width=40000, groups=3) is None


def test_reasons(monkeypatch):
  x, weights, conv, ssm = arrays()
  assert mosaic_gpu.unfit(x, weights, conv, ssm) is None
  assert "GPU" in mosaic_gpu.supports()
  wide = dataclasses.replace(weights, in_proj=weights.in_proj.astype("float32"))
  assert "in_proj" in mosaic_gpu.unfit(x, wide, conv, ssm)
  q = dataclasses.replace(weights, out_proj=int8(weights.out_proj))
  assert mosaic_gpu.unfit(x, q, conv, ssm) is None
  grouped = in_format(weights, "int4:64", None)
  monkeypatch.setattr(mosaic_gpu.dispatch, "needs_wgmma", lambda: None)
  assert mosaic_gpu.supports(x, q, conv, ssm) is None
  assert mosaic_gpu.supports(x, grouped, conv, ssm) is None
  rotated = QWeight(weight=q.out_proj, input=None, hadamard=True)
  q = dataclasses.replace(weights, out_proj=rotated)
  assert "out_proj does it" in mosaic_gpu.unfit(x, q, conv, ssm)
  fp8 = in_format(weights, "fp8_e4m3", None).in_proj
  q = dataclasses.replace(weights, in_proj=fp8)
  assert "w is fp8_e4m3" in mosaic_gpu.unfit(x, q, conv, ssm)
  assert "conv_state" in mosaic_gpu.unfit(
    x, weights, conv.astype("float32"), ssm
  )
  assert "ssm_state" in mosaic_gpu.unfit(
    x, weights, conv, ssm.astype("bfloat16")
  )
  assert "rows" in mosaic_gpu.unfit(jnp.zeros((65, 128)), weights, conv, ssm)
  assert "width" in mosaic_gpu.unfit(x[:, :100], weights, conv, ssm)
  assert "states" in mosaic_gpu.unfit(x, weights, conv, ssm[..., :32])
  assert "multiple of 8" in mosaic_gpu.unfit(x, weights, conv, ssm[:, :, :4])
  with pytest.raises(ValueError, match="kernel needs bfloat16"):
    mosaic_gpu.forward(x, wide, conv, ssm, eps=EPS)
  with pytest.raises(ValueError, match="stages"):
    interpreted(x, weights, conv, ssm, eps=EPS, config=Config(in_stages=1))


@pytest.fixture
def kernels_run_here(monkeypatch):
  """As on a GPU: the kernels come first, here interpreted."""
  monkeypatch.setattr(mosaic_gpu, "forward", interpreted)
  usable = {"mosaic_gpu": mosaic_gpu.unfit, "xla": dispatch.always}
  monkeypatch.setattr(api, "IMPLEMENTATIONS", usable)


def decoded(config, dtype, step, tokens):
  """Logits of decode steps, and the last state of the layers."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda v: jnp.asarray(0.1 * rng.normal(size=v.shape), dtype),
    mamba.abstract_params(config),
  )
  state = mamba.init_state(
    config, tokens.shape[0], cache_size=tokens.shape[1], dtype=dtype
  )
  decode = functools.partial(
    mamba.decode, config, params, implementations=Implementations(step=step)
  )
  # Most of the time goes into compiling the interpreter.
  decode = jax.jit(
    decode,
    donate_argnums=1,
    compiler_options={"xla_backend_optimization_level": 0},
  )
  found = []
  for t in range(tokens.shape[1]):
    logits, state = decode(tokens[:, t : t + 1], state)
    found.append(logits)
  return found, state.layers


@pytest.mark.usefixtures("kernels_run_here")
def test_models_decode_by_it():
  config = MambaConfig.tiny(
    num_layers=3, d_model=128, expand=4, head_dim=64, d_state=64,
    attention=AttentionLayers(
      indices=(0,), num_heads=2, num_kv_heads=1, head_dim=64
    ),
  )  # fmt: skip
  tokens = jax.random.randint(jax.random.key(1), (2, 2), 0, config.vocab_size)
  expected = decoded(config, "bfloat16", "xla", tokens)
  found = decoded(config, "bfloat16", None, tokens)
  assert_close(found, expected, 3 * tolerance("bfloat16", 512))
  # Not the same numbers: those of the kernels are rounded at other places.
  assert np.any(np.asarray(found[0][0]) != np.asarray(expected[0][0]))


@pytest.mark.usefixtures("kernels_run_here")
def test_models_fall_back_to_layer_by_layer():
  config = MambaConfig.tiny()
  tokens = jax.random.randint(jax.random.key(1), (2, 1), 0, config.vocab_size)
  expected = decoded(config, "float32", "xla", tokens)
  found = decoded(config, "float32", None, tokens)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  with pytest.raises(dispatch.UnsupportedError, match="needs bfloat16"):
    decoded(config, "float32", "mosaic_gpu", tokens)
