import functools

import jax
import jax.numpy as jnp
import pytest

from ops.ssd import api, mosaic_tpu
from tests import tpu_compile
from tests.ops import sequence_op


@pytest.mark.parametrize(
  "target, dtype", [("v5e", "bfloat16"), ("v6e", "float32")]
)
def test_both_passes_compile(target, dtype):
  """Two groups of heads, and a length that does not fill its chunks."""
  b, length, h, p, g, n = 2, 200, 4, 64, 2, 128
  activation = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  parameter = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  arrays = {
    "x": activation(b, length, h, p),
    "dt": activation(b, length, h),
    "A": parameter(h),
    "B": activation(b, length, g, n),
    "C": activation(b, length, g, n),
    "D": parameter(h),
    "z": activation(b, length, h, p),
    "dt_bias": parameter(h),
    "initial_state": parameter(b, h, p, n),
  }
  compiled = tpu_compile.compile_for(
    target,
    functools.partial(
      sequence_op.pull, functools.partial(api.apply, mosaic_tpu.forward)
    ),
    arrays,
    jax.ShapeDtypeStruct((b, length), jnp.int32),
    (activation(b, length, h, p), parameter(b, h, p, n)),
  )
  names = tpu_compile.kernels(compiled)
  assert names == ["ssd_bwd", "ssd_fwd"]
