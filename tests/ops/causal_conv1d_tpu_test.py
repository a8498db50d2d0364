import jax
import jax.numpy as jnp
import pytest

from ops.causal_conv1d import mosaic_tpu
from tests import tpu_compile


@pytest.mark.parametrize("target", tpu_compile.TARGETS)
@pytest.mark.parametrize(
  "shape, taps, packed, dtype",
  [((2, 300, 600), 4, True, "bfloat16"), ((1, 5, 256), 2, False, "float32")],
)
def test_compiles(shape, taps, packed, dtype, target):
  batch, length, channels = shape
  of = jax.ShapeDtypeStruct
  x = of(shape, dtype)
  arguments = [
    x,
    of((channels, taps), jnp.float32),
    of((channels,), jnp.float32),
    of((batch, taps - 1, channels), dtype),
    of((batch, length), jnp.int32) if packed else None,
    x,
  ]

  def run(x, weight, bias, state, reach, dy):
    call = lambda *a: mosaic_tpu.convolve(*a, reach, True)
    y, pull = jax.vjp(call, x, weight, bias, state)
    return y, pull(dy)

  compiled = tpu_compile.compile_for(target, run, *arguments)
  assert tpu_compile.kernels(compiled) == [
    "causal_conv1d_bwd",
    "causal_conv1d_fwd",
  ]
