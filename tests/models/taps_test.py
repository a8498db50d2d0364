"""Activations in few bits: places of Mamba layers that no product reads."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, mamba
from models.convert import load, save_safetensors
from models.implementations import Implementations
from models.mamba_config import MambaConfig
from models.quantized import quantize_params
from ops.mamba2_step import Mamba2Weights, mamba2_step
from ops.quantized import QState, Quantizer, Taps, formats
from tests.models.quantized_test import (
  random_params,
  relative,
)

CONFIGS = {
  "mamba1": MambaConfig.tiny("mamba1", vocab_multiple=1),
  "mamba2": MambaConfig.tiny("mamba2", vocab_multiple=1),
  "hybrid": MambaConfig.tiny("hybrid", vocab_multiple=1),
}
PLACES = [
  field.name
  for field in dataclasses.fields(Taps)
  if "state" not in field.name and field.name not in ("k", "v")
]
OF_MAMBA2 = ("conv_BC", "y")
FEW = Quantizer(scales=None, format=formats.get("int8"))


def params_of(name):
  return random_params(CONFIGS[name])


def with_taps(name, taps):
  """Parameters with a quantizer of each layer's own."""
  params = params_of(name)
  layers = {}
  for index, run in enumerate(CONFIGS[name].runs):
    layers[index] = params["layers"][index]
    if run.kind == "mamba":
      mixer = layers[index]["mixer"] | {"taps": taps(run.num_layers)}
      layers[index] = layers[index] | {"mixer": mixer}
  return params | {"layers": layers}


@functools.cache
def tokens_of(name):
  rng = np.random.default_rng(1)
  return rng.integers(CONFIGS[name].vocab_size, size=(2, 8), dtype=np.int32)


forward = jax.jit(language_model.forward, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, static_argnames="name")
def in_pieces(config, params, tokens, name=None):
  """Logits of four tokens read at once and the rest one by one."""
  hidden, state = mamba.prefill(config, params, tokens[:, :4], cache_size=8)
  pieces = [language_model.logits(config, params, hidden)]
  for t in range(4, 8):
    logits, state = mamba.decode(
      config, params, tokens[:, t : t + 1], state,
      implementations=Implementations(step=name),
    )  # fmt: skip
    pieces.append(logits)
  return jnp.concatenate(pieces, axis=1), state


@pytest.mark.parametrize("name", CONFIGS)
def test_models_in_floats_have_none(name):
  """And none is as good as one that names no place."""
  config, params = (
    CONFIGS[name],
    language_model.init(CONFIGS[name], jax.random.key(0)),
  )
  text = str(jax.tree_util.tree_structure(params))
  assert "taps" not in text and "Taps" not in text
  chex.assert_trees_all_equal_shapes(
    params, language_model.abstract_params(config)
  )
  assert not Taps() and Taps(x=FEW)
  same = mamba.bind(config, with_taps(name, lambda _: Taps()))
  chex.assert_trees_all_equal(same, mamba.bind(config, params_of(name)))
  assert not Taps(ssm_state=FEW, conv_state=FEW).of_activations


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_each_place_is_rounded(name, place):
  config, tokens = CONFIGS[name], tokens_of(name)
  quantized = with_taps(name, lambda _: Taps(**{place: FEW}))
  exact = forward(config, params_of(name), tokens)
  found = forward(config, quantized, tokens)
  if name == "mamba1" and place in OF_MAMBA2:
    np.testing.assert_array_equal(found, exact)
    return
  assert 1e-4 < relative(found, exact) < 0.1


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_reading_in_pieces_rounds_alike(name):
  config, tokens = CONFIGS[name], tokens_of(name)
  quantized = with_taps(name, lambda _: Taps(**dict.fromkeys(PLACES, FEW)))
  found = forward(config, quantized, tokens)
  pieces, _ = in_pieces(config, quantized, tokens)
  # Where a sum in another order crosses the middle of two levels, it is off by
  # a step of 1/254.
  assert relative(pieces, found) < 0.02


def static(num_layers):
  """Scales of every granularity, another in each layer."""
  form = lambda text, *shape: Quantizer(
    scales=0.03 + 0.01 * jnp.arange(num_layers, dtype=jnp.float32).reshape(
      -1, *(1,) * len(shape)
    ) * jnp.ones((num_layers, *shape)),
    format=formats.get(text),
  )  # fmt: skip
  return Taps(
    conv_x=form("int8", 1),
    x=form("int8", 1),
    z=form("int8:1", 64),
    B=form("int8:8", 1, 1),
    ssm_state=form("int8", 1, 1),
    conv_state=form("int8", 1),
  )


@pytest.mark.parametrize("name", CONFIGS)
def test_static_scales_go_with_their_layers_and_into_files(tmp_path, name):
  config, tokens = CONFIGS[name], tokens_of(name)
  params = with_taps(name, static)
  found = forward(config, params, tokens)
  assert relative(found, forward(config, params_of(name), tokens)) > 1e-3
  pieces, state = in_pieces(config, params, tokens)
  # Scales of the states are those of the taps, without an entry for each row.
  ssm = state.layers[0].ssm
  assert ssm.static and ssm.tensor.scales.shape[1] == 1
  assert relative(pieces, found) < 0.2
  save_safetensors(tmp_path, config, params)
  chex.assert_trees_all_equal(load(tmp_path).params, params, strict=True)


def test_a_layer_is_taken_out_of_a_stack():
  taps = with_taps("mamba2", static)["layers"][0]["mixer"]["taps"]
  one = taps[1]
  assert one.x.scales.shape == (1,) and one.B.scales.shape == (1, 1)
  assert float(one.x.scales[0]) == pytest.approx(0.04)


def test_mamba2_step_rounds_what_the_layers_round():
  config, tokens = CONFIGS["mamba2"], tokens_of("mamba2")
  params = with_taps("mamba2", static)
  kernels = quantize_params(params, "int8", input="int8", hadamard=True)
  _, state = jax.jit(functools.partial(mamba.prefill, config))(kernels, tokens)
  next_token = tokens[:, :1]
  logits, after = jax.jit(functools.partial(mamba.decode, config))(
    kernels, next_token, state
  )
  block = kernels["layers"][0]
  mixer = block["mixer"]
  weights = Mamba2Weights(
    norm=block["norm"]["scale"],
    in_proj=mixer["in_proj"]["kernel"],
    conv_weight=mixer["conv"]["weight"],
    conv_bias=mixer["conv"]["bias"],
    gated_norm=mixer["norm"]["scale"],
    out_proj=mixer["out_proj"]["kernel"],
    **{name: mixer[name] for name in ("dt_bias", "A_log", "D", "taps")},
  )
  model = mamba.bind(config, kernels)
  run = state.layers[0]
  x, conv, ssm = jax.jit(functools.partial(mamba2_step, eps=config.norm_eps))(
    model.embed(next_token)[:, 0], weights, run.conv, run.ssm
  )
  found = model.logits(model.final_norm(x))
  assert relative(found, logits[:, 0]) < 0.01
  for own, expected in (
    (conv, after.layers[0].conv),
    (ssm, after.layers[0].ssm),
  ):
    assert jax.tree.structure(own) == jax.tree.structure(expected)
    assert (
      relative(jax.vmap(QState.read)(own), jax.vmap(QState.read)(expected))
      < 0.01
    )
