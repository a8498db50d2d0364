"""The Mosaic GPU `token_logprob` without a GPU: interpreted, and lowered."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.token_logprob import api, mosaic_gpu, token_logprob_reference
from ops.token_logprob.mosaic_gpu import Config, configure
from ops.token_logprob.mosaic_gpu_tiles import Walk
from tests.hopper_lowering import lowered
from tests.ops.token_logprob_test import assert_close, reference_gradients

# Tokens, width and vocabulary.
SHAPES = {
  "60m": (65536, 512, 32768),
  "1.3b": (16384, 2048, 50280),
}
STAYS = Config(
  forward=Walk(resident=True, splits=2, stages=2),
  backward=Walk(resident=True, splits=1, stages=2),
  columns=256,
)
STREAMS = Config(
  forward=Walk(resident=False, splits=2, stages=2),
  backward=Walk(resident=False, splits=2, stages=3),
  columns=512,
)


def make(shape, width, vocab, rows, weight_dtype):
  """Arguments with all kinds of targets, and rows of weight that only pad."""
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(*shape, width)), jnp.bfloat16)
  weight = rng.normal(size=(rows, width), scale=2 * width**-0.5)
  weight[vocab:] = np.nan
  # In float32 too, so that the reference reads what the products read.
  weight = jnp.asarray(weight, jnp.bfloat16).astype(weight_dtype)
  targets = rng.integers(0, vocab, size=shape).astype(np.int32)
  targets[0, :4] = 0, vocab - 1, -1, -7
  return hidden.at[0, 3].set(jnp.nan), weight, targets


@pytest.mark.parametrize(
  "config, shape, width, vocab, rows, weight_dtype, scale",
  [
    (STAYS, (2, 65), 192, 300, 301, "float32", 0.7),
    (STREAMS, (2, 75), 128, 641, 700, "bfloat16", 1.5),
    (None, (1, 128), 64, 256, 256, "float32", None),
  ],
  ids=["stays", "streams", "default"],
)
def test_values_and_gradients(
  config, shape, width, vocab, rows, weight_dtype, scale
):
  hidden, weight, targets = make(shape, width, vocab, rows, weight_dtype)
  forward = functools.partial(
    mosaic_gpu.forward, config=config, interpret=plgpu.InterpretGPUParams()
  )
  run = lambda hidden, weight: api.apply(
    forward, hidden, weight, targets, logit_scale=scale, valid_vocab=vocab
  )
  values, pull = jax.vjp(run, hidden, weight)
  outer = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
  gradients = pull(tuple(map(jnp.asarray, outer)))

  scale = scale or 1.0
  expected = token_logprob_reference(
    hidden, weight, targets, logit_scale=scale, valid_vocab=vocab
  )
  for value, wanted in zip(values, expected):
    assert value.dtype == jnp.float32 and value.shape == shape
    assert_close(value, wanted, "float32", width)
  finite = jnp.where(targets[..., None] < 0, 0, hidden)
  wanted = reference_gradients(
    finite, weight, targets, scale, outer, vocab=vocab
  )
  for gradient, want, like in zip(gradients, wanted, (hidden, weight)):
    assert gradient.dtype == like.dtype and gradient.shape == like.shape
    # Gradients of logits are rounded to bfloat16, and so may be the result.
    tolerance = float(jnp.finfo(jnp.bfloat16).eps) * np.abs(want).max()
    found = np.asarray(gradient, np.float64)
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance)
  assert not np.any(gradients[0][0, 2:4]) and not np.any(gradients[1][vocab:])


def test_saturated_and_impossible_targets():
  hidden, weight, _ = make((1, 4), 64, 256, 256, "bfloat16")
  hidden = 100 * hidden.at[0, 3].set(1)
  logits = np.einsum("ble,ve->blv", *(np.float64(v) for v in (hidden, weight)))
  targets = logits.argmax(-1).astype(np.int32)
  targets[0, 0] = 300
  logprob, normalizer = api.apply(
    functools.partial(mosaic_gpu.forward, interpret=plgpu.InterpretGPUParams()),
    *(hidden, weight, targets),
  )
  assert logprob[0, 0] == -np.inf and np.all(logprob <= 0)
  assert_close(normalizer, logits.max(-1), "float32", 64)


def arguments(tokens, width, vocab):
  return (
    jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((vocab, width), jnp.float32),
    jax.ShapeDtypeStruct((tokens,), jnp.int32),
  )


@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_hopper(name):
  hidden, weight, targets = arguments(*SHAPES[name])

  def gradients(hidden, weight, targets):
    run = lambda hidden, weight: mosaic_gpu.forward(
      hidden, weight, targets, vocab=weight.shape[0]
    )
    results, pull = jax.vjp(run, hidden, weight)
    return pull(results)

  module = lowered(gradients, hidden, weight, targets)
  assert module.count("mosaic_gpu_v2") == 2
  # Of logits there are only gradients, in bfloat16 and a block at a time.
  block = f"tensor<{targets.shape[0]}x{configure(*SHAPES[name]).columns}x"
  assert block + "bf16>" in module and block + "f32>" not in module
  assert f"{targets.shape[0]}x{weight.shape[0]}x" not in module


@pytest.mark.parametrize("width", [64, 320, 640, 704, 1024, 2560])
def test_widths_fit_into_shared_memory(width):
  def gradients(hidden, weight, targets):
    run = lambda hidden: mosaic_gpu.forward(hidden, weight, targets, vocab=999)
    results, pull = jax.vjp(run, hidden)
    return pull(results)

  module = lowered(gradients, *arguments(1000, width, 1024))
  assert module.count("mosaic_gpu_v2") == 2


def test_vmap_lowers_for_hopper():
  mapped = jax.vmap(
    functools.partial(mosaic_gpu.forward, vocab=512), in_axes=(0, None, 0)
  )
  hidden, weight, targets = arguments(256, 64, 512)
  both = lambda v: jax.ShapeDtypeStruct((2, *v.shape), v.dtype)
  module = lowered(mapped, both(hidden), weight, both(targets))
  assert module.count("mosaic_gpu_v2") == 1


def test_configurations():
  small, large = (configure(*shape) for shape in SHAPES.values())
  assert small.forward == Walk(resident=True, splits=1, stages=6)
  assert small.columns == 8192
  # All of the hidden states at once would not fit into the cache.
  assert not large.forward.resident and large.forward.splits >= 4
  assert 2 * large.columns >= 50280 and large.columns % 256 == 0
  # Eight blocks of tokens would leave most multiprocessors idle.
  assert configure(1024, 512, 32768).forward.splits == 16
  assert configure(1, 64, 5).columns == 256
  assert configure(1024, 512, 32768, 1000).columns == 768


def test_reasons():
  hidden = jnp.zeros((2, 8, 128), "bfloat16")
  weight = jnp.zeros((300, 128), "float32")
  assert mosaic_gpu.unfit(hidden) is None
  assert "GPU" in mosaic_gpu.supports(hidden, weight)
  assert "bfloat16" in mosaic_gpu.unfit(hidden.astype("float32"))
  assert "64" in mosaic_gpu.unfit(hidden[..., :32])
  assert "128" in mosaic_gpu.unfit(hidden[:0])
  assert "positive" in mosaic_gpu.unfit(hidden, -1.0)
  targets = jnp.zeros((2, 8), jnp.int32)
  with pytest.raises(ValueError, match="positive"):
    mosaic_gpu.forward(hidden[0], weight, targets[0], vocab=300, scale=0.0)
  with pytest.raises(dispatch.UnsupportedError, match="needs an NVIDIA GPU"):
    api.token_logprob(hidden, weight, targets, implementation="mosaic_gpu")
