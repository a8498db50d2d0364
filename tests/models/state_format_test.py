"""Recurrent states of few bits, by generating with them."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, mamba
from models.errors import InputError
from models.mamba_config import MambaConfig
from models.state_format import StateFormat
from models.transformer_config import TransformerConfig
from ops.quantized import QState, Quantizer, Taps, formats
from research.decoding import loop
from research.decoding.plain import Plain
from research.decoding.sampling import Sampling
from tests.models.quantized_test import random_params

CONFIGS = {
  "mamba1": MambaConfig.tiny("mamba1"),
  "mamba2": MambaConfig.tiny("mamba2"),
  "hybrid": MambaConfig.tiny("hybrid"),
}
TOKENS, STEPS = 12, 64
FORMATS = (
  "float32",
  "bfloat16",
  "int8",
  "fp8_e4m3",
  "int6",
  "int4",
  "int8:4+stochastic",
  "int4+residual=int4",
  "int8+conv=int8",
)
GREEDY = Sampling(temperature=0.0)


def parse(text):
  return None if text is None else StateFormat.parse(text)


@functools.cache
def prompts(name):
  rng = np.random.default_rng(1)
  size = CONFIGS[name].vocab_size
  return rng.integers(size, size=(2, TOKENS), dtype=np.int32)


def generate(name, text, tokens, lengths, params=None):
  """Tokens (B, STEPS + 1) by the loop on the device, and the last state."""
  method = Plain(
    config=CONFIGS[name], sampling=GREEDY, state_format=parse(text)
  )
  params = params or random_params(CONFIGS[name])
  batch, first = loop.begin(
    method, params, tokens, jnp.asarray(lengths), jax.random.key(0),
    cache_size=TOKENS + STEPS,
  )  # fmt: skip
  batch, rest = loop.advance(method, params, batch, steps=STEPS)
  found = np.hstack([first.tokens[..., 0], rest.tokens[..., 0]])
  return found, batch.state.model


@functools.partial(jax.jit, static_argnums=(0, 1))
def forced(config, state_format, params, tokens):
  """Logits of tokens of which all but four are read one by one."""
  hidden, state = mamba.prefill(
    config, params, tokens[:, :4], cache_size=tokens.shape[1],
    state_format=state_format,
  )  # fmt: skip
  first = language_model.logits(config, params, hidden)

  def step(state, token):
    logits, state = mamba.decode(config, params, token[:, None], state)
    return state, logits[:, 0]

  _, rest = jax.lax.scan(step, state, tokens[:, 4:].T)
  return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)


@pytest.mark.parametrize(
  "name, text", [*(("mamba2", text) for text in FORMATS), ("hybrid", "int8")]
)
def test_it_generates(name, text):
  """On the device, each step with a rounding, every row as if alone."""
  tokens, lengths = prompts(name), [TOKENS, TOKENS - 5]
  found, state = generate(name, text, tokens, lengths)
  assert found.shape == (2, STEPS + 1) and found.min() >= 0
  if text == "float32":
    same, whole = generate(name, None, tokens, lengths)
    np.testing.assert_array_equal(found, same)
    chex.assert_trees_all_equal(state, whole)
    return
  ssm = state.layers[0].ssm
  if text == "bfloat16":
    assert ssm.dtype == jnp.bfloat16
  else:
    assert isinstance(ssm, QState)
    assert ssm.tensor.format.name == text.partition("+")[0].partition(":")[0]
  assert isinstance(state.layers[0].conv, QState) == ("conv" in text)
  tokens = np.stack([tokens[0][::-1], tokens[1]])
  other, _ = generate(name, text, tokens, [TOKENS - 1, TOKENS - 5])
  np.testing.assert_array_equal(other[1], found[1])
  assert (other[0] != found[0]).any()


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_logits_are_close_over_many_steps(name):
  config = CONFIGS[name]
  params = random_params(config)
  rng = np.random.default_rng(2)
  tokens = rng.integers(config.vocab_size, size=(2, 4 + STEPS), dtype=np.int32)
  exact = forced(config, None, params, tokens)

  def error(text):
    off = np.asarray(forced(config, parse(text), params, tokens) - exact)
    # What is read at once is not rounded yet.
    np.testing.assert_array_equal(off[:, :4], 0)
    return np.sqrt(np.mean(np.square(off)) / np.mean(np.square(exact)))

  int8 = error("int8")
  assert 1e-4 < int8 < 0.03
  if name == "mamba2":
    assert 5 * int8 < error("int4") < 1
    assert error("int4+residual=int4") < 3 * int8


@pytest.mark.parametrize("text", ["int8", "int8+stochastic+conv=int8"])
def test_several_tokens_at_once_are_rounded_one_by_one(text):
  config, tokens = CONFIGS["mamba2"], prompts("mamba2")
  params = random_params(config)
  decode = jax.jit(functools.partial(mamba.decode, config))
  _, state = mamba.prefill(
    config, params, tokens[:, :4], state_format=parse(text)
  )
  together, whole = decode(params, tokens[:, 4:8], state)
  for t in range(4, 8):
    logits, state = decode(params, tokens[:, t : t + 1], state)
    np.testing.assert_allclose(logits[:, 0], together[:, t - 4], atol=1e-4)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, whole)
  read = lambda state: [as_floats(s) for s in jax.tree.leaves(
    state.layers, is_leaf=lambda s: isinstance(s, QState))]  # fmt: skip
  for a, b in zip(read(state), read(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def as_floats(state):
  return np.asarray(state.read() if isinstance(state, QState) else state)


def test_the_model_says_how_its_state_is_kept():
  """Unless the caller does; and its scales serve whoever asks for them."""
  config = CONFIGS["mamba2"]
  scales = jnp.full((config.num_layers, 1, 1), 0.05)
  form = formats.get("int8")
  taps = Taps(ssm_state=Quantizer(scales=scales, format=form))
  params = random_params(config)
  block = params["layers"][0]
  mixer = block["mixer"] | {"taps": taps}
  params = params | {"layers": {0: block | {"mixer": mixer}}}
  ssm_of = lambda text: language_model.init_state(
    config,
    2,
    cache_size=4,
    dtype=jnp.float32,
    state_format=parse(text),
    params=params,
  ).layers[0].ssm  # fmt: skip
  for text in (None, "int8+static", "int8+static+stochastic"):
    ssm = ssm_of(text)
    assert ssm.static and (ssm.noise is None) == (
      text != "int8+static+stochastic"
    )
    np.testing.assert_array_equal(
      ssm.tensor.scales, np.full((2, 1, 1, 1, 1), np.float32(0.05))
    )
  assert not ssm_of("int8").static
  assert ssm_of("float32").dtype == jnp.float32


def test_bytes_of_a_state():
  """At 2.7B: int8 takes a quarter of float32, and two bytes a row more."""
  config = MambaConfig.mamba2_2_7b()
  sizes = {}
  for text in (
    "float32",
    "bfloat16",
    "int8",
    "int6",
    "int4",
    "int4+residual=int4",
  ):
    state = jax.eval_shape(
      lambda text=text: mamba.init_state(
        config, 1, dtype=jnp.bfloat16, state_format=parse(text)
      ).layers[0].ssm
    )  # fmt: skip
    leaves = jax.tree.leaves(state)
    sizes[text] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  rows = config.num_layers * config.d_inner
  assert sizes["float32"] == 4 * 128 * rows
  assert sizes["bfloat16"] == 2 * 128 * rows
  assert sizes["int8"] == (128 + 2) * rows
  assert sizes["int6"] == (96 + 2) * rows
  assert sizes["int4"] == (64 + 2) * rows
  assert sizes["int4+residual=int4"] == sizes["int8"]


WRONG = {
  "ufp6_e3m3": "is for scales and has no negative level",
  "int8+conv=ufp7_e4m3": "is for scales and has no negative level",
  "bitmod4+stochastic": r"leave out \+stochastic",
  "int5": "there is no number format 'int5'; .*write float32, bfloat16 or",
  "int8+quick": "there is no 'quick'",
  "int8+conv": "there is no 'conv'",
  "int8+conv=int5": "there is no number format 'int5'",
  "float32+stochastic": "float32 has no levels to round to",
  "int8:5": "groups of 5 do not divide an axis of 16",
  "int8+static": "the model has no scales for its state",
  "int8+stochastic+residual=int4": "a residual goes with rounding to nearest",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_formats_get_one_clear_line(text):
  with pytest.raises(InputError, match=WRONG[text]) as found:
    mamba.init_state(CONFIGS["mamba2"], 1, state_format=parse(text))
  assert "\n" not in str(found.value)
  assert f"state_format={text[:4]}" in str(found.value)


def test_a_transformer_has_no_such_state():
  config = TransformerConfig.tiny()
  with pytest.raises(InputError, match="a Transformer has no recurrent state"):
    language_model.init_state(
      config, 1, cache_size=4, dtype=jnp.float32, state_format=parse("int8")
    )


def test_what_is_parsed_is_printed_alike():
  text = "int4:16+static+stochastic+conv=int8:row"
  found = StateFormat.parse(text)
  assert str(found) == text
  assert dataclasses.replace(found, seed=1) != found
