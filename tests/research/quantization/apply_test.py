"""Recipes from end to end, on models of a few thousand numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from models.convert import load, save_safetensors
from models.errors import InputError
from ops.quantized import QTensor, QWeight
from research.cost import sizes
from research.quantization import apply, calibration, recipes, smoothing
from research.quantization.recipes import RECIPES
from research.quantization.statistics import Statistics
from tests.research.quantization.conftest import (
  difference,
  logits,
  random_model,
)

# Of logits of random models; trained ones lose far less.
WITHIN = {"int8": 0.08, "int4": 0.4}


def within(recipe):
  return WITHIN[recipe.kernels.partition(":")[0]]


@pytest.fixture(scope="module")
def wanted(mamba2, batches):
  return logits(*mamba2, batches[0])


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_stays_near_the_float_model(name, mamba2, batches, wanted):
  config, params = mamba2
  recipe, done = RECIPES[name], []
  found = apply.quantize(config, params, recipe, batches, done.append)
  most = apply.work(config, recipe)
  assert sum(done) == most or (recipe.float_share and sum(done) < most)
  error = difference(logits(*found, batches[0]), wanted)
  assert 1e-4 < error < within(recipe)
  assert sizes.weight_bytes(*found) < sizes.weight_bytes(config, params)
  mixer = found[1]["layers"][0]["mixer"]
  kernel = mixer["in_proj"]["kernel"]
  assert isinstance(kernel, QWeight if recipe.inputs else QTensor)
  assert ("taps" in mixer) == bool(recipe.taps or recipe.states)
  # Nobody's parameters are written over.
  assert not isinstance(params["embed"]["table"], QTensor)


@pytest.mark.parametrize(
  "family, name",
  [
    ("mamba1", "quamba2_w4a8"),
    ("hybrid", "quamba2_w8a8"),
    ("transformer", "w4a16"),
    ("transformer", "mambaquant_w8a8"),
    ("gemma", "gptq_int4"),
  ],
)
def test_other_families(family, name, batches):
  config, params = random_model(family)
  recipe = recipes.get(name)
  found = apply.quantize(config, params, recipe, batches)
  error = difference(
    logits(*found, batches[0]), logits(config, params, batches[0])
  )
  assert 1e-4 < error < 1.5 * within(recipe)


def test_a_saved_model_is_the_same_bit_for_bit(mamba2, batches, tmp_path):
  config, params = apply.quantize(*mamba2, RECIPES["quamba2_w4a8"], batches)
  save_safetensors(tmp_path, config, params)
  back = load(tmp_path)
  again = logits(back.config, back.params, batches[0])
  np.testing.assert_array_equal(again, logits(config, params, batches[0]))
  taps = back.params["layers"][0]["mixer"]["taps"]
  assert taps.ssm_state.format.name == "int8"


def test_planted_outliers_break_one_scale_a_tensor_alone(mamba2, batches):
  config, params = mamba2
  planted = smoothing.plant_outliers(config, params, factor=100.0, count=1)
  wanted = logits(config, params, batches[0])

  def error(name):
    found = apply.quantize(config, planted, RECIPES[name], batches)
    return difference(logits(*found, batches[0]), wanted)

  naive, ours = error("w8a8_naive"), error("quamba2_w8a8")
  assert naive > 0.5 and ours < naive / 3


def test_scales_of_x_follow_its_clusters(mamba2, batches):
  config, params = mamba2
  recipe = RECIPES["quamba2_w8a8"]
  _, found = apply.quantize(config, params, recipe, batches)
  taps = found["layers"][0]["mixer"]["taps"]
  shape = (config.num_layers, config.num_heads, config.head_dim)
  assert taps.x.scales.shape == shape
  for layer in np.asarray(taps.x.scales):
    # Heads and channels were sorted, so that a cluster is one block.
    assert (np.diff(layer, axis=1) >= 0).all()
    assert len(np.unique(layer)) <= 16 * config.num_groups
  assert taps.B.scales.shape == (config.num_layers, config.num_groups, 1)
  assert taps.dt.scales.shape == shape[:2]
  assert taps.z.scales.shape == (config.num_layers, 1)


def test_clipping_lowers_the_scale_of_x(mamba2, batches):
  config, params = mamba2
  recipe = RECIPES["quamba_w8a8"]
  scale = lambda clip: (
    apply.quantize(
      config, params, dataclasses.replace(recipe, clip=clip), batches
    )[1]["layers"][0]["mixer"]["taps"].x.scales
  )
  assert (scale(99.0) < scale(100.0)).all()


def test_numbers_that_are_not_finite_name_their_place(mamba2, batches):
  config, params = mamba2
  kernel = params["layers"][0]["mixer"]["out_proj"]["kernel"]
  broken = jax.tree.map(lambda a: a, params)
  broken["layers"][0]["mixer"]["out_proj"]["kernel"] = kernel.at[0].set(jnp.nan)
  with pytest.raises(InputError, match="layer 1: what mixer.*is NaN"):
    calibration.calibrate(config, broken, batches)


def test_a_quantized_model_is_not_quantized_again(mamba2, batches):
  recipe = RECIPES["rtn_w8a16"]
  found = apply.quantize(*mamba2, recipe, None)
  with pytest.raises(InputError, match="quantized already"):
    apply.quantize(*found, recipe, None)
  with pytest.raises(InputError, match="calibrate"):
    apply.quantize(*mamba2, RECIPES["w4a16"], None)


def test_bytes_are_those_that_are_kept(mamba2):
  config, params = mamba2
  rows = config.padded_vocab_size - config.vocab_size
  count = language_model.num_params(config) - rows * config.d_model
  assert sizes.weight_bytes(config, params) == 2 * count


def test_products_of_channels_that_gptq_cannot_use_are_one_line():
  kernel = jnp.ones((4, 4))
  gram = jnp.diag(jnp.asarray([1.0, 1.0, 1.0, -1.0]))
  seen = Statistics(
    count=jnp.ones(()), absmax=jnp.ones(4), histogram=None, gram=gram
  )
  with pytest.raises(InputError, match="GPTQ of mixer.in_proj"):
    apply._kernel(RECIPES["w4a16"], kernel, "int4", seen, ("mixer", "in_proj"))
