"""`mamba2_step` against float64, and its checks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dequantize, quantize
from ops.mamba2_step import (
  Mamba2Weights,
  api,
  mamba2_step,
  mamba2_step_reference,
)
from tests.ops.sequence_op import assert_close, tolerance

EPS = 1e-5


def make(
  seed, *, layers=2, batch=3, width=24, heads=4, channels=8, groups=2, state=16,
  taps=4, dtype="float32", shapes_only=False,
):  # fmt: skip
  """Arrays of a step; all but x and the state of `ssd` have the dtype.

  `shapes_only` is for what is traced alone: large ones take seconds to draw.
  """
  rng = np.random.default_rng(seed)
  inner = heads * channels
  mixed = inner + 2 * groups * state

  def normal(*shape, scale=1.0, mean=0.0):
    if shapes_only:
      return jnp.zeros(shape)
    return jnp.asarray(mean + scale * rng.normal(size=shape), "float32")

  weights = Mamba2Weights(
    norm=normal(layers, width, scale=0.1, mean=1.0),
    in_proj=normal(layers, width, inner + mixed + heads, scale=width**-0.5),
    conv_weight=normal(layers, mixed, taps, scale=0.5),
    conv_bias=normal(layers, mixed, scale=0.1),
    dt_bias=normal(layers, heads),
    A_log=normal(layers, heads),
    D=normal(layers, heads),
    gated_norm=normal(layers, inner, scale=0.1, mean=1.0),
    out_proj=normal(layers, inner, width, scale=inner**-0.5),
  )
  cast = jax.jit(lambda tree: jax.tree.map(lambda v: v.astype(dtype), tree))
  return (
    normal(batch, width),
    cast(weights),
    cast(normal(layers, batch, taps - 1, mixed)),
    normal(layers, batch, heads, channels, state),
  )


def int8(kernels):
  """Stacked kernels, each column with a scale of its own."""
  return jax.vmap(functools.partial(quantize, format="int8", axis=-2))(kernels)


def compare(forward, arrays, tokens=2):
  """Some tokens, one after the other, with the states donated."""
  x, weights, *states = arrays
  dtype = str(states[0].dtype)
  # Most of the time goes into compiling, above all an interpreter.
  step = jax.jit(
    functools.partial(forward, eps=EPS),
    donate_argnums=(2, 3),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  expected = [np.asarray(s, np.float64) for s in states]
  # What the caller holds must outlive the donation.
  states = [jnp.array(s) for s in states]
  layers, terms = weights.out_proj.shape[:2]
  for token in range(tokens):
    inputs = x * (1 + token)
    y, *states = step(inputs, weights, *states)
    exact, *expected = mamba2_step_reference(
      inputs, weights, *expected, eps=EPS
    )
    bound = (token + 1) * layers * tolerance(dtype, terms)
    assert_close((y, *states), (exact, *expected), bound, f"token {token}")
    assert y.dtype == jnp.float32 and states[0].dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla(dtype):
  forward = functools.partial(mamba2_step, implementation="xla")
  compare(forward, make(0, dtype=dtype))


def test_one_row_one_group():
  compare(mamba2_step, make(1, layers=1, batch=1, groups=1))


def test_rows_are_independent():
  x, weights, conv, ssm = make(2)
  together = mamba2_step(x, weights, conv, ssm, eps=EPS)
  for row in range(x.shape[0]):
    own = slice(row, row + 1)
    alone = mamba2_step(x[own], weights, conv[:, own], ssm[:, own], eps=EPS)
    expected = together[0][own], *(s[:, own] for s in together[1:])
    assert_close(alone, expected, tolerance("float32", 32))


def test_quantized_weights_are_those_that_they_stand_for():
  x, weights, *states = make(6)
  q = dataclasses.replace(
    weights, in_proj=int8(weights.in_proj), out_proj=int8(weights.out_proj)
  )
  plain = dataclasses.replace(
    weights, in_proj=dequantize(q.in_proj), out_proj=dequantize(q.out_proj)
  )
  step = jax.jit(functools.partial(mamba2_step, eps=EPS))
  found, expected = (step(x, w, *states) for w in (q, plain))
  assert_close(found, expected, 2 * tolerance("float32", 32))


@pytest.mark.parametrize(
  "name, cut",
  [
    ("in_proj", lambda v: v[..., 1:]),
    ("conv_weight", lambda v: v[..., 1:]),
    ("A_log", lambda v: v[:1]),
    ("out_proj", lambda v: v[:, :, None]),
  ],
)
def test_weights_must_fit(name, cut):
  x, weights, conv, ssm = make(3)
  bad = dataclasses.replace(weights, **{name: cut(getattr(weights, name))})
  with pytest.raises(ValueError, match=f"mamba2_step: {name} is"):
    mamba2_step(x, bad, conv, ssm, eps=EPS)


def test_states_must_fit():
  x, weights, conv, ssm = make(4)
  with pytest.raises(ValueError, match="are not"):
    mamba2_step(x[0], weights, conv, ssm, eps=EPS)
  with pytest.raises(ValueError, match="channels of conv_state"):
    mamba2_step(x, weights, conv[..., 1:], ssm, eps=EPS)
  with pytest.raises(ValueError, match="ssm_state is"):
    mamba2_step(x, weights, conv, ssm[:, :1], eps=EPS)
  with pytest.raises(ValueError, match="float16"):
    mamba2_step(x, weights, conv.astype("float16"), ssm, eps=EPS)


def test_the_kernels_need_a_gpu():
  with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
    mamba2_step(*make(5), eps=EPS, implementation="mosaic_gpu")
  assert api.resolve(*make(5)) == "xla"
