"""The Mosaic GPU `ssd` without a GPU: interpreted numbers, lowered kernels."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.ssd import api, mosaic_gpu, ssd_reference, xla
from ops.ssd.mosaic_gpu import Config, configure
from tests.hopper_lowering import lowered
from tests.ops import sequence_op
from tests.ops.sequence_op import SequenceOp, assert_close, tolerance

SHAPES = {
  "mamba2-130m": (8, 2048, 24, 64, 1, 128),
  "mamba2-1.3b": (8, 4096, 64, 64, 1, 128),
  "mamba2-2.7b": (1, 32768, 80, 64, 1, 128),
}


def make(seed, batch, length, heads, channels, groups, state):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  return {
    "x": normal(batch, length, heads, channels),
    "dt": normal(batch, length, heads),
    "A": -np.exp(normal(heads)),
    "B": normal(batch, length, groups, state),
    "C": normal(batch, length, groups, state),
    "D": normal(heads, channels),
    "z": normal(batch, length, heads, channels),
    "dt_bias": normal(heads),
    "initial_state": normal(batch, heads, channels, state),
  }


def interpreted(config, batch, length, **sizes):
  """The op as the interpreter runs it; TMA copies happen at once."""
  forward = functools.partial(
    mosaic_gpu.forward, config=config, interpret=plgpu.InterpretGPUParams()
  )
  return SequenceOp(
    op=functools.partial(api.apply, forward),
    reference=ssd_reference,
    oracle=sequence_op.ssd_oracle,
    make=functools.partial(make, **sizes),
    batch=batch,
    length=length,
  )


SMALL = interpreted(
  # Zeros fill up channels and states.
  Config(heads=2, stages=2),
  2,
  70,
  heads=2,
  channels=48,
  groups=1,
  state=40,
)
CUT = interpreted(
  Config(heads=1, stages=2, segments=2, splits=2),
  1, 65, heads=2, channels=128, groups=2, state=128,
)  # fmt: skip


@pytest.mark.parametrize("case", ["packed", "extreme"])
def test_values_and_gradients(case):
  SMALL.compare_gradients(case, "bfloat16")


def test_segments_splits_wide_heads_and_groups():
  CUT.compare_gradients("full", "bfloat16")


def test_a_skip_a_head_and_no_states():
  """Of y alone, and with a row of heads that do not come in pairs."""
  arrays, _ = interpreted(
    None, 1, 100, heads=3, channels=64, groups=1, state=64
  ).case("bare", "bfloat16")
  arrays["D"] = jnp.asarray([0.5, -2.0, 1.0])

  def pull(forward, arrays, dy):
    y, pullback = jax.vjp(lambda a: api.apply(forward, **a), arrays)
    return y, pullback(dy.astype(y.dtype))[0]

  kernel = functools.partial(
    mosaic_gpu.forward, interpret=plgpu.InterpretGPUParams()
  )
  dy = jnp.asarray(np.random.default_rng(1).normal(size=arrays["x"].shape))
  dy = dy.astype(jnp.bfloat16)
  found = jax.jit(functools.partial(pull, kernel))(arrays, dy)
  exact = jax.tree.map(lambda v: v.astype(jnp.float32), arrays)
  expected = jax.jit(functools.partial(pull, xla.forward))(exact, dy)
  assert_close(found, expected, tolerance("bfloat16", 100 * 64))


def arguments(b, length, h, p, g, n):
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  return (
    bf16((b, length, h, p)),
    f32((b, length, h)),
    f32((b, length, h)),
    bf16((b, length, g, n)),
    bf16((b, length, g, n)),
    f32((b, h, p, n)),
    f32((h, p)),
    bf16((b, length, h, p)),
  )


@pytest.mark.parametrize("name", ["mamba2-130m", "mamba2-2.7b"])
def test_forward_lowers_for_hopper(name):
  module = lowered(mosaic_gpu.forward, *arguments(*SHAPES[name]))
  assert module.count("mosaic_gpu_v2") == (3 if name == "mamba2-2.7b" else 2)


def test_gradients_lower_for_hopper():
  def gradients(*arrays):
    forward = functools.partial(mosaic_gpu.forward, config=Config())
    results, pullback = jax.vjp(forward, *arrays)
    return pullback(results)

  module = lowered(gradients, *arguments(2, 1000, 8, 64, 2, 64))
  assert module.count("mosaic_gpu_v2") == 6


def test_gradients_of_y_alone_lower_for_hopper():
  """As a model asks for them: a skip a head, and no states."""

  def gradients(x, dt, A, B, C, D):
    op = functools.partial(api.apply, mosaic_gpu.forward, dt_softplus=True)
    y, pullback = jax.vjp(lambda *v: op(*v[:-1], D=v[-1]), x, dt, A, B, C, D)
    return pullback(y)

  x, dt, _, B, C, *_ = arguments(2, 1024, 8, 64, 1, 128)
  heads = jax.ShapeDtypeStruct((8,), jnp.float32)
  module = lowered(gradients, x, dt, heads, B, C, heads)
  assert module.count("mosaic_gpu_v2") == 6
  # Nothing as large as a state is made for the gradient of the last one.
  assert "tensor<2x8x64x128xf32>" not in module.replace(
    "-> (tensor<2x1024x8x64xbf16>, tensor<2x8x64x128xf32>)", ""
  )


def test_vmap_lowers_for_hopper():
  mapped = jax.vmap(mosaic_gpu.forward, in_axes=(0,) * 6 + (None, 0))
  *arrays, D, z = arguments(1, 128, 2, 64, 1, 64)
  both = lambda v: jax.ShapeDtypeStruct((2, *v.shape), v.dtype)
  module = lowered(mapped, *map(both, arrays), D, both(z))
  assert module.count("mosaic_gpu_v2") == 2


def test_configurations():
  segments = {}
  for name, (b, length, h, _, g, _) in SHAPES.items():
    config = configure(b, length, h, g)
    assert config.heads == 2 and config.splits == 1
    segments[name] = config.segments
  assert segments["mamba2-130m"] == segments["mamba2-1.3b"] == 1
  # 40 blocks would leave two of three multiprocessors idle.
  assert segments["mamba2-2.7b"] >= 3
  assert configure(1, 1, 3, 1) == Config(heads=1)
  for length in (64, 65, 1000, 4096):
    config = configure(1, length, 4, 2)
    chunks = -(-length // 64)
    share = -(-chunks // config.segments)
    assert (config.segments - 1) * share < chunks
    assert 4 // 2 % config.splits == 0


def test_reasons():
  x, B = (jnp.zeros((1, 64, 2, 64), "bfloat16"),) * 2
  assert mosaic_gpu.unfit(x, B) is None
  assert "GPU" in mosaic_gpu.supports(x, B)
  assert "bfloat16" in mosaic_gpu.unfit(x.astype("float32"), B)
  assert mosaic_gpu.unfit(x[..., :32], B[..., :32]) is None
  assert "32" in mosaic_gpu.unfit(x[..., :31], B)
  assert "state size" in mosaic_gpu.unfit(x, B[..., :16])
  assert "chunk_size" in mosaic_gpu.unfit(x, B, 128)
  with pytest.raises(ValueError, match="bfloat16"):
    mosaic_gpu.forward(*(v.astype("float32") for v in (x, B)), *[None] * 6)
  with pytest.raises(dispatch.UnsupportedError, match="needs an NVIDIA GPU"):
    api.ssd(x, x[..., 0], x[0, 0, :, 0], B, B, implementation="mosaic_gpu")
