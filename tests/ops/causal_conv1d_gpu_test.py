"""The GPU kernels of the causal convolution on a CPU: interpreted, lowered."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.causal_conv1d import api, causal_conv1d, mosaic_gpu, xla
from ops.causal_conv1d.mosaic_gpu import Config, Walk, configure
from tests.hopper_lowering import lowered
from tests.ops import causal_conv1d_test as contract


def interpreted(walk: Walk):
  """The kernels as the interpreter runs them."""
  return functools.partial(
    mosaic_gpu.convolve,
    config=Config(walk, walk),
    interpret=plgpu.InterpretGPUParams(),
  )


def compiled(function):
  # Most of the time goes into compiling the interpreter.
  options = {"xla_backend_optimization_level": 0}
  return jax.jit(function, compiler_options=options)


@pytest.mark.parametrize("case", contract.CASES)
def test_values_and_gradients_match_float64(case, monkeypatch):
  """Blocks that overlap, and segments and padding inside of them."""
  dtype, activation, packed = contract.CASES[case]
  everywhere = dict.fromkeys(api.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)
  monkeypatch.setattr(mosaic_gpu, "convolve", interpreted(Walk(2, 4, 8)))
  arrays, cotangents = contract.make(dtype=dtype, channels=260)
  ids = contract.SEGMENTS if packed else None

  def run(arrays):
    return causal_conv1d(
      **arrays,
      activation=activation,
      return_final_state=True,
      segment_ids=ids,
      implementation="mosaic_gpu",
    )

  @compiled
  def both(arrays):
    values, pull = jax.vjp(run, arrays)
    return values, pull(cotangents)[0]

  (y, state), gradients = both(arrays)
  assert y.dtype == state.dtype == dtype
  expected, last = contract.reference(arrays, ids, activation=activation)
  contract.assert_close(y, expected, dtype, 4)
  np.testing.assert_array_equal(np.asarray(state, np.float64), last)
  expected = contract.oracle_gradients(arrays, ids, cotangents, activation)
  assert gradients.keys() == expected.keys()
  tokens = contract.BATCH * contract.LENGTH
  for name, gradient in gradients.items():
    assert gradient.dtype == arrays[name].dtype
    contract.assert_close(gradient, expected[name], gradient.dtype, tokens)


@pytest.mark.parametrize(
  "taps, length, walk, silu, dtype, given",
  [
    (2, 24, Walk(2, 4, 12, "tanh", 2), True, "float32", ("bias", "reach")),
    (3, 16, Walk(2, 2, 8, "tanh", 8), False, "float32", ("reach", "state")),
    (4, 29, Walk(2, 3, 12), True, "float32", ("bias", "reach", "state")),
    (4, 3, Walk(2, 3, 3), True, "float32", ("bias", "state")),
    (5, 13, Walk(4, 4, 4), False, "bfloat16", ()),
  ],
)
def test_equals_xla(taps, length, walk, silu, dtype, given):
  """Other taps, lengths and options; a reach that no segments would give."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  # Two blocks, of which the second begins in the first.
  channels = walk.channels + 4
  x, dy = draw(2, length, channels), draw(2, length, channels)
  weight = draw(channels, taps)
  bias = draw(channels) if "bias" in given else None
  state = draw(2, taps - 1, channels) if "state" in given else None
  reach = None
  if "reach" in given:
    reach = rng.integers(-1, taps, size=(2, length)).astype(np.int32)

  def run(convolve):
    def both(*arrays):
      y, pull = jax.vjp(lambda *a: convolve(*a, reach, silu), *arrays)
      return y, *pull(dy)

    return compiled(both)(x, weight, bias, state)

  found, expected = run(interpreted(walk)), run(xla.convolve)
  for value, wanted in zip(found, expected, strict=True):
    if wanted is None:
      assert value is None
    else:
      assert value.dtype == wanted.dtype
      wanted = np.asarray(wanted, np.float64)
      contract.assert_close(value, wanted, dtype, 2 * length)


def test_default_config_of_a_short_row():
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, weight = draw(1, 13, 256), draw(256, 4)
  run = compiled(
    lambda x: mosaic_gpu.convolve(
      x, weight, None, None, None, True, None, plgpu.InterpretGPUParams()
    )
  )
  expected = xla.convolve(x, weight, None, None, None, True)
  contract.assert_close(run(x), expected, "float32", 4)


def shapes(batch, length, channels, taps=4, dtype="bfloat16", packed=False):
  struct = jax.ShapeDtypeStruct
  return (
    struct((batch, length, channels), dtype),
    struct((channels, taps), "float32"),
    struct((channels,), "float32"),
    struct((batch, taps - 1, channels), dtype) if packed else None,
    struct((batch, length), "int32") if packed else None,
  )


@pytest.mark.parametrize(
  "shape, dtype, packed",
  [
    ((8, 2048, 1536), "bfloat16", False),
    ((2, 1001, 4352), "bfloat16", True),
    ((1, 77, 258), "float32", True),
  ],
)
def test_lowers_for_hopper(shape, dtype, packed):
  def run(x, weight, bias, state, reach):
    call = lambda *arrays: mosaic_gpu.convolve(*arrays, reach, True)
    y, pull = jax.vjp(call, x, weight, bias, state)
    return y, pull(y)

  text = lowered(run, *shapes(*shape, dtype=dtype, packed=packed))
  assert text.count("custom_call @mosaic_gpu_v2") == 2
  for name in ("causal_conv1d_fwd", "causal_conv1d_bwd"):
    assert name in text


def test_vmap_lowers_for_hopper():
  x, weight, *_ = shapes(2, 64, 256, taps=2)
  several = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
  call = lambda x, w: mosaic_gpu.convolve(x, w, None, None, None, False)
  text = lowered(jax.vmap(call, in_axes=(0, None)), several, weight)
  assert text.count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize("length", [3, 8, 13, 1000, 2048, 2050, 4096])
@pytest.mark.parametrize("batch, channels", [(1, 256), (8, 1536), (8, 4352)])
def test_blocks_fit_the_tokens(batch, length, channels):
  config = configure(batch, length, channels)
  for walk in (config.forward, config.backward):
    assert walk.rows <= walk.tokens <= length
    assert walk.tokens % walk.rows == 0
    assert channels >= walk.channels
    assert walk.rows >= 3


@pytest.mark.parametrize(
  "shape", [(8, 2048, 1536), (8, 4096, 4096), (1, 4096, 4096), (3, 3000, 2560)]
)
def test_blocks_come_in_whole_waves(shape):
  batch, length, channels = shape
  config = configure(*shape)
  for walk, vector in ((config.forward, 4), (config.backward, 2)):
    assert walk.vector == vector
    blocks = batch * channels // walk.channels * walk.segments(length)
    waves = blocks / (4 * mosaic_gpu.PROCESSORS)
    assert waves > 0.9 * np.ceil(waves)


def test_values_of_two_bytes_take_the_fast_gate():
  for dtype, gate in (("bfloat16", "tanh"), ("float32", "root")):
    config = configure(8, 2048, 1536, dtype)
    assert config.forward.gate == config.backward.gate == gate


def test_unsupported_shapes_have_reasons():
  def reason(shape=(1, 8, 256), taps=4, dtype="bfloat16"):
    x, weight, *_ = shapes(*shape, taps=taps, dtype=dtype)
    return mosaic_gpu.unfit(x, weight)

  assert reason() is None
  assert "float16" in reason(dtype="float16")
  assert "channels from 256, not 192" in reason((1, 8, 192))
  assert "even number of channels" in reason((1, 8, 257))
  assert "2 to 8 taps" in reason(taps=9)
  assert "at least 3 tokens" in reason((1, 2, 256))


def test_needs_a_hopper_gpu():
  assert "needs an NVIDIA GPU" in mosaic_gpu.supports()
  x, weight = jnp.zeros((1, 8, 256)), jnp.zeros((256, 4))
  with pytest.raises(dispatch.UnsupportedError, match="needs an NVIDIA GPU"):
    causal_conv1d(x, weight, implementation="mosaic_gpu")
