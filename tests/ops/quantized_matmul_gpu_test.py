"""The GPU kernel of `quantized_matmul`, interpreted and lowered on a CPU."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import hopper, quantized_matmul
from ops.quantized import FORMATS
from ops.quantized_matmul import (
  mosaic_gpu,
  mosaic_gpu_product,
  quantized_matmul_reference,
  xla,
)
from ops.quantized_matmul.mosaic_gpu import Config, configure
from tests.hopper_lowering import lowered
from tests.ops.quantized_products import operands, shapes
from tests.ops.quantized_test import TWO_LEVELS
from tests.ops.sequence_op import assert_close, tolerance

interpreted = functools.partial(
  mosaic_gpu.forward,
  dtype=jnp.float32,
  interpret=plgpu.InterpretGPUParams(),
)


@pytest.mark.parametrize(
  "form, activations, shape, config",
  [
    # Several columns of blocks with a rest, rows that fill no tile.
    (
      "int4:128",
      None,
      (3, 512, 136),
      Config(warpgroups=2, stages=2, tiles=2),
    ),
    # Splits that are no multiple of each other, and warpgroups without work.
    (
      "int8:row",
      "int8:row",
      (8, 320, 72),
      Config(warpgroups=2, stages=2, splits=2),
    ),
    # Scales that fill no 16 bytes, a split with fewer of them, more stages
    # than chunks.
    (
      "int4:64",
      "int8:tensor",
      (9, 384, 64),
      Config(warpgroups=1, stages=9, splits=2),
    ),
    # A scale of several chunks.
    ("int8:256", None, (16, 1024, 64), None),
    ("int4:tensor", None, (1, 128, 64), Config(warpgroups=1)),
    # Levels that are looked up, with scales of two bytes, and an x of few bits.
    ("nf4", None, (3, 512, 136), Config(warpgroups=2, stages=2, tiles=2)),
    ("fp4:64", "int8:row", (9, 384, 64), Config(warpgroups=1, splits=2)),
    # Groups with a level of their own, scales of one and of two levels.
    ("fp4_ea:64", None, (8, 640, 72), Config(warpgroups=2, splits=2)),
    ("bitmod4", None, (1, 256, 64), Config(warpgroups=1)),
    # Several groups in a chunk, whose scales multiply levels.
    ("mxint4", None, (3, 384, 64), Config(warpgroups=1, splits=2)),
    ("razer4", None, (8, 320, 72), Config(warpgroups=2, splits=2)),
  ],
)
def test_values(form, activations, shape, config):
  x, w = operands(form, *shape, activations)
  y = interpreted(x, w, config=config)
  expected = quantized_matmul_reference(x, w)
  if form == "nf4":
    # Its levels are rounded to bfloat16, as all that x multiplies.
    book = jnp.asarray(FORMATS["nf4"].codebook, jnp.bfloat16)
    rounded = dataclasses.replace(
      FORMATS["nf4"], codebook=tuple(book.astype(float).tolist())
    )
    expected = quantized_matmul_reference(
      x, dataclasses.replace(w, format=rounded)
    )
  # Levels are exact in bfloat16, and sums float32.
  assert_close(y, expected, tolerance("float32", shape[1]))


def test_leading_axes_gradients_and_stacks():
  x, w = operands("int8:64", 4, 128, 64)
  config = Config(warpgroups=1, stages=2)
  run = functools.partial(interpreted, config=config)
  y, pull = jax.vjp(lambda x: run(x.reshape(2, 2, 128), w), x)
  plain, pull_plain = jax.vjp(lambda x: xla.forward(x, w, dtype=jnp.float32), x)
  bound = tolerance("float32", 128)
  assert_close(y.reshape(4, 64), plain, bound)
  cotangent = jnp.sin(jnp.arange(256.0)).reshape(4, 64)
  np.testing.assert_array_equal(
    pull(cotangent.reshape(2, 2, 64))[0], pull_plain(cotangent)[0]
  )
  stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, w[:, ::-1])
  both = jax.vmap(run, (None, 0))(x, stack)
  assert_close(both[0], plain, bound)
  assert_close(both[1], plain[:, ::-1], bound)


@pytest.mark.parametrize(
  "rows, depth, width, form, activations",
  [
    (1, 2560, 10576, "int4:128", None),
    (64, 5120, 2560, "int4:64", "int8:row"),
    (64, 768, 3352, "int8:row", None),
    (1, 2560, 10576, "bitmod4", None),
    (1, 8192, 8192, "razer4", None),
  ],
)
def test_lowers_for_hopper_and_moves_no_weight(
  rows, depth, width, form, activations
):
  x, w = shapes(form, rows, depth, width, activations)
  run = functools.partial(mosaic_gpu.forward, dtype=jnp.bfloat16)
  text = lowered(run, x, w)
  assert text.count("custom_call @mosaic_gpu_v2") == 1
  assert "quantized_matmul" in text
  moved = [line for line in text.splitlines() if "stablehlo.transpose" in line]
  assert not any(f"x{width}x" in line.split("->")[0] for line in moved)


def test_stacked_weights_lower_as_one_kernel():
  x, w = shapes("int4:128", 4, 256, 64)
  stack = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), w
  )
  run = functools.partial(mosaic_gpu.forward, dtype=jnp.bfloat16)
  text = lowered(jax.vmap(run, (None, 0)), x, stack)
  assert text.count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_launches_fit_the_machine(rows, bits):
  sizes = (768, 3352), (2560, 10576), (5120, 2560), (8192, 8192), (2560, 50280)
  # Of small groups, and of 64, no power of two divides many of these.
  sizes += (4160, 4096), (8256, 4096), (16128, 4096), (16448, 4096)
  for depth, width in sizes:
    for size in (depth, 128, 64, 32, 16):
      if depth % size or (size < 64 and bits > 4):
        continue
      small, groups = size < 64, depth // size
      width_of_scales = 2 if small else 4
      config = configure(
        rows, depth, width, bits, groups, width_of_scales, special=small
      )
      product = mosaic_gpu_product.Product(
        rows=mosaic_gpu.padded(rows),
        depth=depth,
        groups=groups,
        packed=bits == 4,
        table=(0,) * 16 if small else None,
        special=small,
        scale_dtype=jnp.dtype("bfloat16" if small else "float32"),
        **{name: getattr(config, name) for name in Config.__annotations__},
      )
      assert product.share * (config.splits - 1) < product.chunks
      ring = product.columns * product.chunk * bits // 8
      ring += 2 * product.rows * product.chunk
      shared = config.warpgroups * (
        config.stages * ring + 4 * product.rows * (product.columns + 4)
      )
      kept = width_of_scales * (1 + small)
      shared += kept * product.columns * product.scales
      assert product.scales <= mosaic_gpu_product.MOST_SCALES
      assert shared <= hopper.SHARED_MEMORY


@pytest.mark.parametrize(
  "form, activations, shape, message",
  [
    # Two levels of scales go with codebooks alone.
    (
      dataclasses.replace(TWO_LEVELS, group=64, codebook=None),
      None,
      (4, 256, 64),
      "symmetric integer grid",
    ),
    ("int4_asym:64", None, (4, 256, 64), "symmetric integer grid"),
    ("lloyd4", None, (4, 256, 64), "the same in all weights"),
    ("nf4", "int8:row", (4, 256, 64), "levels of bfloat16"),
    ("sf4:32", None, (4, 256, 64), "scales of small groups"),
    ("mxfp4:64", None, (4, 256, 64), "scales of 32 or 16 bits"),
    ("razer4", None, (4, 96, 64), "groups of a multiple of 64"),
    ("fp4_ea:row", None, (4, 256, 64), "several groups that choose"),
    ("fp8_e4m3:row", None, (4, 256, 64), "symmetric integer grid"),
    ("int8:row", "int8:64", (4, 256, 64), "one scale a row"),
    ("int8:32", None, (4, 256, 64), "groups of a multiple of 64"),
    ("int8:row", None, (4, 256, 60), "columns of a multiple of 8"),
    # More scales than eight splits copy at once.
    ("mxfp4", None, (4, 131072, 64), "scales that fit shared memory"),
  ],
)
def test_what_it_does_not_take(form, activations, shape, message):
  x, w = shapes(form, *shape, activations)
  assert message in mosaic_gpu.unfit(x, w)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(interpreted, x, w)


def test_more_rows_are_for_another_kernel():
  for rows in (mosaic_gpu.MAX_ROWS, mosaic_gpu.MAX_ROWS + 1):
    x, w = shapes("int8:row", rows, 256, 64)
    run = functools.partial(mosaic_gpu.forward, dtype=jnp.bfloat16)
    many = rows > mosaic_gpu.MAX_ROWS
    assert ("quantized_matmul_wide" in lowered(run, x, w)) == many


def test_any_number_of_scales(monkeypatch):
  monkeypatch.setattr(mosaic_gpu.dispatch, "needs_wgmma", lambda: None)
  for depth in (2048, 2560, 8192):
    x, w = shapes("int4:128", 1, depth, 64)
    assert mosaic_gpu.supports(x, w) is None


def test_it_is_named_where_it_does_not_run():
  x, w = operands("int8:row", 4, 128, 64)
  with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
    quantized_matmul(x, w, implementation="mosaic_gpu")
