"""The GPU kernels of `rms_norm` on a CPU: interpreted, lowered."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.rms_norm import api, mosaic_gpu, rms_norm, xla
from ops.rms_norm.mosaic_gpu import Config, configure
from tests.hopper_lowering import lowered
from tests.ops import rms_norm_test as contract


def interpreted(config=None):
  """The kernels as the interpreter runs them."""
  return functools.partial(
    mosaic_gpu.forward, config=config, interpret=plgpu.InterpretGPUParams()
  )


def cut(channels, **changes):
  """A Config for 14 rows, with several steps a block."""
  walk = configure(14, channels).forward
  walk = dataclasses.replace(walk, **changes)
  return Config(walk, walk)


@pytest.mark.parametrize(
  "form, dtype, groups, config",
  [
    # Blocks that overlap; a row a warp, and a row in four parts.
    ("plain", "float32", 1, cut(256, slabs=1, rows=8)),
    ("plain", "bfloat16", 1, cut(512, split=True, rows=6, slabs=2)),
    ("gated", "bfloat16", 2, cut(128, slabs=2, rows=8, ahead=False)),
    ("gated", "float32", 1, cut(512, split=True, slabs=3, rows=9)),
    ("gated", "bfloat16", 1, cut(256, rows=4, slabs=1,
                                 again=True)),
    ("gated", "bfloat16", 1, cut(1024, rows=6, slabs=2)),
    ("residual", "bfloat16", 1, cut(512, split=True, slabs=1, rows=7,
                                    again=True, ahead=False)),
    ("residual", "float32", 2, cut(128, slabs=1, rows=4)),
    ("residual", "bfloat16", 1, None),
  ],
)  # fmt: skip
def test_values_and_gradients_match_float64(
  form, dtype, groups, config, monkeypatch
):
  everywhere = dict.fromkeys(api.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)
  monkeypatch.setattr(mosaic_gpu, "forward", interpreted(config))
  channels = groups * (config.forward.channels if config else 128)
  arrays, cotangents = contract.make(form, dtype, shape=(2, 7, channels))
  run = functools.partial(
    rms_norm, num_groups=groups, eps=contract.EPS, implementation="mosaic_gpu"
  )
  contract.check(arrays, cotangents, dtype, groups, run)


def test_is_rounded_as_by_xla():
  arrays, _ = contract.make("plain", "bfloat16", shape=(8, 128))
  options = {"num_groups": 1, "eps": 1e-5, "dtype": jnp.dtype("bfloat16")}
  both = [
    run(arrays["x"], arrays["scale"], None, None, **options)
    for run in (xla.forward, interpreted())
  ]
  # A root that is another in its last bit can turn a rounding.
  assert np.mean(np.asarray(both[0] != both[1])) < 0.02


def shapes(form, rows, channels, dtype="bfloat16"):
  struct = jax.ShapeDtypeStruct
  x, wide = (struct((rows, channels), d) for d in (dtype, jnp.float32))
  scale = struct((channels,), jnp.float32)
  gate = x if form == "gated" else None
  return x, scale, gate, wide if form == "residual" else None


@pytest.mark.parametrize(
  "form, rows, channels, groups, dtype",
  [
    ("residual", 65536, 512, 1, "bfloat16"),
    ("plain", 65536, 512, 1, "float32"),
    ("gated", 65536, 1024, 1, "bfloat16"),
    ("gated", 65536, 1024, 8, "bfloat16"),
    ("residual", 16384, 2560, 1, "bfloat16"),
    ("gated", 16384, 5120, 1, "bfloat16"),
    ("gated", 1001, 5120, 1, "float32"),
    ("plain", 77, 1152, 1, "bfloat16"),
  ],
)
def test_lowers_for_hopper(form, rows, channels, groups, dtype):
  def run(*arrays):
    call = functools.partial(
      mosaic_gpu.forward,
      num_groups=groups,
      eps=1e-5,
      dtype=jnp.dtype("bfloat16"),
    )
    y, pull = jax.vjp(lambda *a: call(*a), *arrays)
    return y, pull(y)

  text = lowered(run, *shapes(form, rows, channels, dtype))
  assert text.count("custom_call @mosaic_gpu_v2") == 2
  for name in ("rms_norm_fwd", "rms_norm_bwd"):
    assert name in text


def test_many_layers_share_their_kernels():
  def kernels(layers):
    def run(x, scale, residual):
      for _ in range(layers):
        x, residual = mosaic_gpu.forward(
          x, scale, None, residual, num_groups=1, eps=1e-5, dtype=x.dtype
        )
      return jnp.sum(x.astype(jnp.float32))

    x, scale, _, residual = shapes("residual", 64, 128)
    text = lowered(jax.grad(run, argnums=(0, 1, 2)), x, scale, residual)
    return text.count("custom_call @mosaic_gpu_v2")

  # The first and the last layer may have their own.
  assert kernels(6) == kernels(3) <= 4


def test_vmap_lowers_for_hopper():
  x, scale, *_ = shapes("plain", 64, 256)
  several = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
  call = lambda x, scale: mosaic_gpu.forward(
    x, scale, None, None, num_groups=1, eps=1e-5, dtype=x.dtype
  )
  text = lowered(jax.vmap(call, in_axes=(0, None)), several, scale)
  assert text.count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize("rows", [4, 7, 13, 1000, 65536])
@pytest.mark.parametrize("channels", [128, 512, 640, 1024, 1536, 2560, 5120])
def test_blocks_fit_the_rows(rows, channels):
  config = configure(rows, channels)
  for walk in (config.forward, config.backward):
    assert walk.step_rows <= walk.rows <= rows
    assert walk.rows % walk.step_rows == 0
    assert walk.line % walk.shape[1] == 0
    # Vectors of 16 bytes of float32, and no more than registers hold.
    assert walk.vector == 4 and walk.line <= 64 * 32
    assert rows % walk.rows == 0 or rows % 256


def test_blocks_fill_the_chip():
  config = configure(65536, 1024)
  assert 65536 // config.forward.rows >= 8 * mosaic_gpu.PROCESSORS
  assert 65536 // config.backward.rows >= 4 * mosaic_gpu.PROCESSORS
  assert config.forward.vector == 4 and config.forward.split


def test_unsupported_shapes_have_reasons():
  def reason(form="plain", rows=8, channels=256, given="bfloat16", **options):
    x, _, gate, residual = shapes(form, rows, channels, given)
    return mosaic_gpu.unfit(x, gate, residual, **options)

  assert reason() is reason("gated") is reason("residual") is None
  assert "not float16" in reason("gated", given="float16")
  assert "gives bfloat16 or float32" in reason(dtype="float16")
  assert "channels, not 192" in reason(channels=192)
  assert "channels, not 64" in reason(num_groups=4)
  assert "channels, not 8320" in reason(channels=8320)
  assert "at least 4 rows" in reason(rows=3)


def test_needs_a_hopper_gpu():
  assert "needs an NVIDIA GPU" in mosaic_gpu.supports()
