import jax
import jax.numpy as jnp
import pytest

from ops.selective_scan import mosaic_tpu
from tests import tpu_compile


@pytest.mark.parametrize("target", tpu_compile.TARGETS)
@pytest.mark.parametrize(
  "shape, groups, size, dtype, full",
  [
    ((2, 300, 600), 1, 16, "bfloat16", True),
    ((1, 256, 512), 2, 64, "float32", False),
  ],
)
def test_compiles(shape, groups, size, dtype, full, target):
  """With all options on partial blocks, and without any on whole ones."""
  batch, length, channels = shape
  of = jax.ShapeDtypeStruct
  wide, narrow = of(shape, dtype), of((batch, length, groups, size), dtype)
  row = of((channels,), jnp.float32)
  state = of((batch, channels, size), jnp.float32)
  A = of((channels, size), jnp.float32)
  options = (row, wide, row, state) if full else (None,) * 4
  marks = of((batch, length), jnp.int32) if full else None

  def run(arrays, marks, cotangents):
    scan = lambda arrays: mosaic_tpu.selective_scan(
      *arrays, marks, dt_softplus=full
    )
    results, pullback = jax.vjp(scan, arrays)
    return results, pullback(cotangents)

  arrays = (wide, wide, A, narrow, narrow, *options)
  compiled = tpu_compile.compile_for(target, run, arrays, marks, (wide, state))
  assert tpu_compile.kernels(compiled) == [
    "selective_scan_bwd",
    "selective_scan_fwd",
  ]
