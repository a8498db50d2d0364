"""Formats of what tokens bring: inputs of kernels, keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from models.convert import load, save_safetensors
from models.errors import InputError
from ops.quantized import FORMATS, QTensor, QWeight
from research.bench.suites import decoding
from research.cost import sizes
from research.quantization import apply, calibration, recipes, smoothing, taps
from tests.research.quantization.conftest import (
  difference,
  logits,
  random_model,
)

# Bytes of a key of 8 channels: codes, scales, zero points, choices.
CACHES = {
  "int4_asym:row": 4 + 2 + 1,
  "razer4_token": 4 + (7 + 4) + 1,
  "mxfp4": 4 + 1,
}


@pytest.fixture(scope="module")
def transformer():
  return random_model("transformer")


@pytest.mark.parametrize("cache", CACHES)
def test_a_text_is_read_from_a_cache_in_few_bits(cache, transformer, batches):
  """Token by token, from a prompt or from nothing, as in one pass."""
  recipe = recipes.get(f"rtn_w8a16+cache={cache}")
  config, params = apply.quantize(*transformer, recipe, None)
  tokens = jnp.asarray(batches[0, :, :12])
  whole = logits(config, params, tokens)
  assert 1e-3 < difference(whole, logits(*transformer, tokens)) < 0.5
  state = language_model.init_state(
    config, 2, cache_size=12, dtype=jnp.float32, params=params
  )
  keys = state.cache.k
  assert isinstance(keys, QTensor) and str(keys.format).startswith(cache[:5])
  plain = language_model.init_state(config, 2, cache_size=12, dtype=jnp.float32)
  share = sizes.nbytes(state.cache) / sizes.nbytes(plain.cache)
  assert 4 * config.head_dim * share == CACHES[cache]
  step = jax.jit(language_model.decode, static_argnums=0)
  for at in range(12):
    found, state = step(config, params, tokens[:, at : at + 1], state)
    np.testing.assert_allclose(found[:, 0], whole[:, at], atol=1e-4)
  hidden, prompted = language_model.prefill(
    config, params, tokens[:, :5], jnp.asarray([5, 3]), cache_size=12
  )
  found = language_model.logits(config, params, hidden)
  np.testing.assert_allclose(found[0], whole[0, :5], atol=1e-4)
  found, _ = step(config, params, tokens[:, 5:6], prompted)
  np.testing.assert_allclose(found[0, 0], whole[0, 5], atol=1e-4)


def test_a_hybrid_keeps_its_cache_so_too_and_files_say_so(batches, tmp_path):
  model = random_model("hybrid")
  recipe = recipes.get("rtn_w8a16+cache=nf4:row")
  config, params = apply.quantize(*model, recipe, None)
  save_safetensors(tmp_path, config, params)
  back = load(tmp_path)
  tokens = jnp.asarray(batches[0, :, :8])
  whole = logits(back.config, back.params, tokens)
  np.testing.assert_array_equal(whole, logits(config, params, tokens))
  state = language_model.init_state(
    config, 2, cache_size=8, dtype=jnp.float32, params=back.params
  )
  found, _ = language_model.decode(config, params, tokens, state)
  np.testing.assert_allclose(found, whole, atol=1e-4)
  mixers = random_model("mamba2")
  with pytest.raises(InputError, match="keeps no keys and values"):
    apply.quantize(*mixers, recipe, None)


def test_smoothing_keys_leaves_the_function_and_evens_channels(
  transformer, batches
):
  config, params = transformer
  wild = np.ones((config.num_kv_heads, 2, config.head_dim // 2), np.float32)
  wild[:, :, 1] = 20
  queries = np.repeat(wild, config.num_heads // config.num_kv_heads, axis=0)
  attn = params["layers"]["attn"]
  kernels = {
    "k_proj": {"kernel": attn["k_proj"]["kernel"] * wild.reshape(1, 1, -1)},
    "q_proj": {"kernel": attn["q_proj"]["kernel"] / queries.reshape(1, 1, -1)},
  }
  layers = params["layers"] | {"attn": attn | kernels}
  params = params | {"layers": layers}
  notes, _ = calibration.calibrate(config, params, batches)
  smooth = smoothing.smooth_keys(config, params, notes)
  wanted = logits(config, params, batches[0])
  np.testing.assert_allclose(
    logits(config, smooth, batches[0]), wanted, rtol=2e-3, atol=2e-3
  )
  after, _ = calibration.calibrate(config, smooth, batches)
  spread = lambda seen: float(jnp.max(seen.absmax) / jnp.median(seen.absmax))
  key = calibration.KEYS
  assert spread(notes[0][key]) > 8 and spread(after[0][key]) < 4
  errors = []
  for more in ("", "+smooth_keys"):
    recipe = recipes.get(f"rtn_w8a16+cache=int4_asym:row{more}")
    found = apply.quantize(config, params, recipe, batches)
    errors.append(difference(logits(*found, batches[0]), wanted))
  assert errors[1] < 0.7 * errors[0]


def test_inputs_have_scales_of_each_token(transformer, batches):
  config, params = transformer
  recipe = recipes.get("p3_w4a8kv4")
  found = apply.quantize(config, params, recipe, batches)
  wanted = logits(config, params, batches[0])
  assert 1e-3 < difference(logits(*found, batches[0]), wanted) < 0.5
  kernel = found[1]["layers"]["mlp"]["up_proj"]["kernel"]
  assert isinstance(kernel, QWeight) and kernel.input.scales is None
  assert kernel.input.format.name == "fp8_e4m3"
  # What comes later changes nothing: no scale is of two tokens.
  recipe = recipes.get("nvfp4+inputs=nvfp4_token")
  found = apply.quantize(config, params, recipe, None)
  tokens = batches[0].copy()
  first = logits(*found, tokens)[:, :4]
  tokens[:, 4:] = 7
  np.testing.assert_array_equal(logits(*found, tokens)[:, :4], first)


def test_clipping_is_for_nearest_levels_and_gptq(transformer, batches):
  wanted = logits(*transformer, batches[0])
  kernel = lambda found: found[1]["layers"]["mlp"]["down_proj"]["kernel"]
  for name in ("int4", "gptq_sf4"):
    given = batches if "gptq" in name else None
    plain, clipped = (
      apply.quantize(*transformer, recipes.get(name + more), given)
      for more in ("", "+clipped")
    )
    assert not np.array_equal(kernel(plain).values, kernel(clipped).values)
    assert difference(logits(*clipped, batches[0]), wanted) < 0.5


def test_options_of_recipes():
  rotated = recipes.get("gptq_sf4+hadamard")
  assert rotated.rotates_outputs and rotated.gptq and rotated.is_static
  both = recipes.get("bitmod3+inputs=int8:row+cache=int4_asym:32")
  assert (both.inputs, both.cache) == ("int8:row", "int4_asym:32")
  assert both.dynamic and not both.is_static
  apart = {
    name
    for name, form in FORMATS.items()
    if form.is_signed and form.keeps_rows_apart and not form.fitted
  }
  assert apart == set(recipes.OF_TOKENS)


@pytest.mark.parametrize(
  "name, said",
  [
    ("sf5", "'sf5': there is none such"),
    ("sf4+wild", r"\+wild is not known"),
    ("sf4+inputs", r"\+inputs is not known"),
    ("sf4+inputs=razer4", "no format of what tokens bring"),
    ("sf4+cache=ufp6_e3m3", "no format of what tokens bring"),
    ("sf4+cache=lloyd4", "no format of what tokens bring"),
    ("sf4+inputs=int8:tensor", "tokens would share"),
    ("sf4+hadamard+hadamard", "twice"),
    ("sf4+smooth_keys", "give .cache=FORMAT"),
  ],
)
def test_what_is_no_recipe_is_one_line(name, said):
  with pytest.raises(InputError, match=said) as error:
    recipes.get(name)
  assert "\n" not in str(error.value)


def test_formats_that_do_not_go_are_refused():
  for form in ("razer4", "sf4:tensor", "ufp7_e4m3", "sf4_fit"):
    with pytest.raises(ValueError, match="no format of what tokens bring"):
      taps.dynamic_quantizer(form, 64)
  with pytest.raises(InputError, match="no negative level"):
    decoding.check_formats("int4/ufp7_e4m3")
  decoding.check_formats("razer4/int8")
