"""Checkpoints of one model as users bring them, all of which must agree."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import transformer
from models.convert import forms, load, save_safetensors
from models.convert.hf_config import from_hf, to_hf
from models.errors import InputError
from models.layers import rope_frequencies
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from tests.models import gguf_files

CONFIG = TransformerConfig.tiny(num_layers=1, tie_embeddings=False)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    transformer.abstract_params(CONFIG),
  )


@pytest.fixture
def folder(tmp_path, params):
  save_safetensors(tmp_path / "m", CONFIG, params)
  return tmp_path / "m"


def change_json(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def put(folder, tensors):
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def refusal(source):
  with pytest.raises(InputError) as caught:
    load(source)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  "rename",
  [
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module.{name}",
    lambda name: f"module._orig_mod.{name}",
    # Layers that are wrapped one by one.
    lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    # A base model, and a head beside it.
    lambda name: name.removeprefix("model."),
    lambda name: "_orig_mod." * (name != HEAD) + name.removeprefix("model."),
  ],
)
def test_prefixes_of_all_names_are_left_out(folder, params, rename):
  put(folder, {rename(n): x for n, x in tensors_of(folder).items()})
  chex.assert_trees_all_equal(load(folder).params, params)


def test_messages_name_tensors_as_the_file_does(folder):
  tensors = tensors_of(folder)
  tensors["model.norm.weight"] = tensors["model.norm.weight"][:3]
  put(folder, {f"module.{n}": x for n, x in tensors.items()})
  assert "'module.model.norm.weight' has shape (3,)" in refusal(folder)


def test_a_head_that_differs_from_a_tied_table_is_kept(folder, params):
  change_json(folder, tie_word_embeddings=True)
  found = load(folder)
  assert not found.config.tie_embeddings
  chex.assert_trees_all_equal(found.params, params)
  tensors = tensors_of(folder)
  put(folder, tensors | {HEAD: tensors[TABLE]})
  assert load(folder).config.tie_embeddings


def test_a_mamba_head_that_differs_from_a_tied_table_is_kept(tmp_path):
  config = MambaConfig.tiny(
    tie_embeddings=False, vocab_size=64, vocab_multiple=1, num_layers=1
  )
  leaves = forms.FORMS[MambaConfig].leaves(config)
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(size=leaf.tensor_shape).astype(np.float32)
    for leaf in leaves
    if not leaf.optional
    for name in leaf.names
  }
  hf = forms.to_hf(config, "float32") | {"tie_word_embeddings": True}
  (tmp_path / "config.json").write_text(json.dumps(hf))
  put(tmp_path, tensors)
  found = load(tmp_path).params["lm_head"]["kernel"]
  np.testing.assert_array_equal(found, tensors[HEAD].T)


def test_the_index_says_which_file_holds_a_tensor(folder, params):
  """Another file has tensors of the same names, and one of no use."""
  first, last = "model-00001-of-00002", "model-00002-of-00002"
  tensors = tensors_of(folder)
  (folder / "model.safetensors").rename(folder / f"{first}.safetensors")
  other = {n: x + 1 for n, x in tensors.items() if n != "model.norm.weight"}
  safetensors.numpy.save_file(
    other | {"optimizer.step": np.zeros(3, np.float32)},
    folder / f"{last}.safetensors",
  )
  places = dict.fromkeys(tensors, f"{first}.safetensors")
  places["lm_head.weight"] = f"{last}.safetensors"
  index = {"weight_map": places}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  found = load(folder).params
  chex.assert_trees_all_equal(found["embed"], params["embed"])
  expected = params["lm_head"]["kernel"] + 1
  np.testing.assert_array_equal(found["lm_head"]["kernel"], expected)


def test_packed_weights_are_refused_by_the_key_of_the_config(folder):
  change_json(folder, quantization_config={"quant_method": "gptq", "bits": 4})
  message = refusal(folder)
  assert "config.json: quantization_config" in message
  assert "before it was quantized" in message


def test_types_that_numpy_has_not_are_named(folder):
  path = folder / "model.safetensors"
  put(folder, tensors_of(folder) | {TABLE: np.zeros((64, 32), np.uint8)})
  data = path.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + length])
  header[TABLE]["dtype"] = "F8_E4M3"
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
  message = refusal(folder)
  assert f"'{TABLE}' is of type F8_E4M3" in message
  assert "bfloat16 or float32" in message


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_found_when_loaded(folder, number):
  tensors = tensors_of(folder)
  name = "model.layers.0.mlp.up_proj.weight"
  tensors[name][3, 4] = number
  put(folder, tensors)
  assert f"'{name}' has numbers that are NaN or infinite" in refusal(folder)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_positions_are_divided_where_the_config_says_linear(folder, key):
  change_json(folder, **{key: {"rope_type": "linear", "factor": 4.0}})
  config = load(folder).config
  assert config.rope_factor == 4.0
  np.testing.assert_allclose(
    rope_frequencies(8, 1e4, factor=4.0), rope_frequencies(8, 1e4) / 4
  )
  assert from_hf(to_hf(config, "float32"), "") == config


def test_a_float32_stream_is_told_by_the_key_of_mamba():
  config = TransformerConfig.tiny(float32_stream=True)
  hf = to_hf(config, "float32")
  assert hf["residual_in_fp32"] is True and from_hf(hf, "") == config
  assert "residual_in_fp32" not in to_hf(TransformerConfig.tiny(), "float32")


def test_llama3_scaling_takes_the_original_length_from_the_top(folder):
  scaling = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
  }
  change_json(folder, rope_scaling=scaling)
  assert "a whole 'llama3'" in refusal(folder)
  change_json(folder, original_max_position_embeddings=8192)
  assert load(folder).config.rope_scaling.original_max_position == 8192


def write_gguf(path, params, **options):
  gguf_files.write(path, "llama", CONFIG, params, **options)


@pytest.mark.parametrize(
  ("metadata", "factor"),
  [
    ({}, 1.0),
    ({"scale_linear": 4.0}, 4.0),
    ({"scaling.factor": 4.0}, 4.0),
    ({"scaling.type": "linear", "scaling.factor": 1.0}, 1.0),
    ({"scaling.type": "linear", "scaling.factor": 0.0}, 1.0),
    ({"scaling.type": "none", "scaling.factor": 4.0}, 1.0),
  ],
)
def test_gguf_divides_positions_as_llama_cpp_does(
  metadata, factor, tmp_path, params
):
  write_gguf(tmp_path / "m.gguf", params, rope=metadata)
  assert load(tmp_path / "m.gguf").config.rope_factor == factor


def test_gguf_of_other_scaling_is_refused(tmp_path, params):
  write_gguf(tmp_path / "m.gguf", params, rope={"scaling.type": "yarn"})
  assert "'yarn' is not supported" in refusal(tmp_path / "m.gguf")


def test_a_gguf_in_parts_is_read_from_any_of_them(tmp_path, params):
  write_gguf(tmp_path / "one.gguf", params)
  whole = load(tmp_path / "one.gguf")
  write_gguf(tmp_path / "m.gguf", params, split=5)
  parts = sorted(tmp_path.glob("m-*.gguf"))
  assert len(parts) == 3
  for part in parts:
    found = load(part)
    assert found.config == whole.config
    chex.assert_trees_all_equal(found.params, whole.params)
  parts[1].unlink()
  assert f"{parts[1]}: is missing" in refusal(parts[2])
  parts[0].rename(tmp_path / "other.gguf")
  assert "is one of 3 parts" in refusal(tmp_path / "other.gguf")


def test_bfloat16_weights_are_finite_or_not_as_well(folder, params):
  tensors = tensors_of(folder)
  half = {n: jnp.asarray(x, jnp.bfloat16) for n, x in tensors.items()}
  put(folder, {n: np.asarray(x) for n, x in half.items()})
  found = load(folder, jnp.bfloat16).params
  chex.assert_trees_all_close(found, params, rtol=2.0**-8)
  half[HEAD] = half[HEAD].at[1, 1].set(jnp.nan)
  put(folder, {n: np.asarray(x) for n, x in half.items()})
  assert f"'{HEAD}' has numbers" in refusal(folder)
