"""The GPU kernel of `quantized_matmul` for many rows, interpreted and lowered.

Real GPUs alone run integers of first sums and operands in registers: the
interpreter multiplies plainly in their place.
"""

import functools
import itertools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import hopper
from ops.quantized_matmul import (
  mosaic_gpu,
  mosaic_gpu_walk,
  mosaic_gpu_wide,
  quantized_matmul_reference,
  xla,
)
from ops.quantized_matmul.mosaic_gpu_walk import Config, Sizes
from tests.hopper_lowering import lowered
from tests.ops.quantized_products import operands, shapes
from tests.ops.sequence_op import assert_close, tolerance

interpreted = functools.partial(
  mosaic_gpu.forward,
  dtype=jnp.float32,
  interpret=plgpu.InterpretGPUParams(),
)
# Columns as rows of the matrix unit, as converted weights need them.
transposed = functools.partial(
  Config, columns=128, transposed=True, split="columns", stages=2
)
# Activations and weights in the formats of models.
VARIANTS = {
  "W8A8": ("int8:row", "int8:row"),
  "W8A8 in groups": ("int8:row", "int8:128"),
  "W4A8": ("int8:row", "int4:row"),
  "W4A8 in groups": ("int8:row", "int4:128"),
  "fp8": ("fp8_e4m3:row", "fp8_e4m3:row"),
  "W4 with fp8": ("fp8_e4m3:row", "int4:128"),
  "W4A16": (None, "int4:128"),
  "W8A16": (None, "int8:row"),
}


@pytest.mark.parametrize(
  "activations, form, shape, config",
  [
    # Rests along all axes, several tiles of a thread block.
    (
      "int8:row",
      "int8:row",
      (134, 256, 328),
      Config(columns=128, stages=2, walk=2, blocks=2),
    ),
    # Warpgroups that share the columns, a ring longer than a tile's chunks.
    (
      "int8:tensor",
      "int8:tensor",
      (200, 128, 72),
      Config(rows=64, columns=128, split="columns", stages=3, blocks=1),
    ),
    # A scale of several chunks.
    ("int8:row", "int8:256", (130, 512, 64), Config(columns=64, stages=3)),
    # Thread blocks of a cluster, of which the last one has no rows.
    (
      "int8:row",
      "int8:row",
      (300, 256, 72),
      Config(columns=64, stages=2, cluster="rows", blocks=2),
    ),
    ("int8:row", "int4:row", (72, 256, 136), transposed(rows=64, blocks=2)),
    ("int8:row", "int4:128", (72, 256, 200), transposed(rows=64, blocks=2)),
    (
      "int8:row",
      "int4:row",
      (72, 128, 264),
      transposed(rows=64, cluster="columns"),
    ),
    ("int4:row", "int4:tensor", (66, 128, 64), transposed(rows=64)),
    (
      "fp8_e4m3:row",
      "fp8_e4m3:row",
      (130, 256, 72),
      Config(columns=64, stages=3, promote=1),
    ),
    ("fp8_e4m3:row", "int4:128", (130, 256, 72), transposed(rows=64)),
    (None, "int4:64", (70, 256, 72), transposed(rows=64)),
    (None, "int8:row", (70, 64, 72), transposed(rows=64)),
  ],
)
def test_values(activations, form, shape, config):
  x, w = operands(form, *shape, activations)
  y = interpreted(x, w, config=config)
  # Levels are exact in the dtype of the product, and sums float32 or int32.
  assert_close(
    y, quantized_matmul_reference(x, w), tolerance("float32", shape[1])
  )


def test_result_in_bfloat16_is_rounded_once():
  x, w = operands("int4:row", 66, 128, 64, "int8:row")
  config = transposed(rows=64)
  y = interpreted(x, w, config=config)
  z = interpreted(x, w, config=config, dtype=jnp.bfloat16)
  np.testing.assert_array_equal(z, y.astype(jnp.bfloat16))


def test_leading_axes_and_gradients():
  x, w = operands("int4:128", 80, 128, 64)
  run = functools.partial(interpreted, config=transposed(rows=64))
  y, pull = jax.vjp(lambda x: run(x.reshape(2, 40, 128), w), x)
  plain, pull_plain = jax.vjp(lambda x: xla.forward(x, w, dtype=jnp.float32), x)
  assert_close(
    y.reshape(80, 64),
    quantized_matmul_reference(x, w),
    tolerance("float32", 128),
  )
  cotangent = jnp.sin(jnp.arange(80.0 * 64)).reshape(plain.shape)
  np.testing.assert_array_equal(
    pull(cotangent.reshape(2, 40, 64))[0], pull_plain(cotangent)[0]
  )


@pytest.mark.parametrize("variant", VARIANTS)
def test_lowers_for_hopper_as_one_kernel_that_moves_no_weight(variant):
  activations, form = VARIANTS[variant]
  x, w = shapes(form, 4096, 8192, 8192, activations)
  run = functools.partial(mosaic_gpu.forward, dtype=jnp.bfloat16)
  text = lowered(run, x, w)
  assert text.count("custom_call @mosaic_gpu_v2") == 1
  assert "quantized_matmul_wide" in text
  moved = [line for line in text.splitlines() if "stablehlo.transpose" in line]
  assert not any("8192x8192x" in line or "8192x4096x" in line for line in moved)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(65, 256, 72), (4094, 2560, 10576)])
def test_rests_along_every_axis_lower_for_hopper(variant, shape):
  activations, form = VARIANTS[variant]
  x, w = shapes(form, *shape, activations)
  for dtype in (jnp.bfloat16, jnp.float32):
    run = functools.partial(mosaic_gpu.forward, dtype=dtype)
    assert "quantized_matmul_wide" in lowered(run, x, w)


@pytest.mark.parametrize("cluster", ["rows", "columns"])
def test_clusters_and_float32_lower_for_hopper(cluster):
  for config, form in (
    (Config(cluster=cluster), "int8:row"),
    (transposed(cluster=cluster), "int4:row"),
  ):
    x, w = shapes(form, 512, 256, 512, "int8:row")
    run = functools.partial(
      mosaic_gpu.forward, dtype=jnp.float32, config=config
    )
    assert "quantized_matmul_wide" in lowered(run, x, w)


@pytest.mark.parametrize("groups", [1, 128])
@pytest.mark.parametrize(
  "operand, bits",
  [("int8", 8), ("int8", 4), ("float8_e4m3fn", 4), ("bfloat16", 4)],
)
def test_launches_fit_the_machine(operand, bits, groups):
  operand, stored = (
    jnp.dtype(operand),
    jnp.dtype("uint8" if bits == 4 else "int8"),
  )
  sizes = (768, 3352), (2560, 10576), (8192, 8192), (2560, 50280)
  for rows, (depth, width), out in itertools.product(
    (65, 256, 8192), sizes, ("bfloat16", "float32")
  ):
    count = 1 if groups == 1 else depth // groups
    config = mosaic_gpu_wide.configure(
      rows, depth, width, bits, count, operand, jnp.dtype(out)
    )
    k = Sizes(
      rows=rows,
      width=width,
      depth=depth,
      groups=count,
      packed=bits == 4,
      stored=stored,
      operand=operand,
      out=jnp.dtype(out),
      config=config,
      interpret=False,
    )
    assert k.unfit is None
    pieces = mosaic_gpu_walk.WORKERS * k.pieces * 64 * mosaic_gpu_walk.LINE
    assert k.ring + pieces <= hopper.SHARED_MEMORY


@pytest.mark.parametrize(
  "activations, form, shape, message",
  [
    ("int8:64", "int8:row", (65, 256, 64), "one scale a row"),
    ("int8:row", "fp8_e4m3:row", (65, 256, 64), "need more"),
    ("int8:row", "int8:64", (65, 256, 64), "groups of a multiple of 128"),
    (None, "int8:32", (65, 256, 64), "groups of a multiple of 64"),
    (None, "fp8_e4m3:row", (65, 256, 64), "an integer grid with a float x"),
    ("int8:row", "int6:row", (65, 256, 64), "8 bits, or 4 in pairs"),
    ("int8:row", "int8:row", (65, 256, 60), "columns by eights"),
    ("int8:row", "int8:row", (65, 2**18, 64), "at most 131072"),
    ("int8:row", "int8:row", (65, 192, 64), "groups of a multiple of 128"),
  ],
)
def test_what_it_does_not_take(activations, form, shape, message):
  x, w = shapes(form, *shape, activations)
  assert message in mosaic_gpu.unfit(x, w)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(interpreted, x, w)


@pytest.mark.parametrize(
  "config, message",
  [
    (Config(rows=64), "a warpgroup cannot multiply"),
    (Config(rows=256, columns=256), "are too many"),
    (transposed(rows=72), "cannot be written in pieces"),
    (Config(stages=1), "chunks do not fit"),
    (Config(promote=3), "chunks do not fit"),
  ],
)
def test_launches_that_cannot_be(config, message):
  x, w = shapes("int8:row", 65, 512, 64, "int8:row")
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda x, w: interpreted(x, w, config=config), x, w)


def test_weights_in_registers_are_rows_of_the_matrix_unit():
  x, w = shapes("int4:row", 65, 512, 64, "int8:row")
  with pytest.raises(ValueError, match="weights in registers are 64 rows"):
    jax.eval_shape(lambda x, w: interpreted(x, w, config=Config()), x, w)
