"""Files of Gemma 3: what they say, how norms are written, what is refused."""

import json

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import transformer
from models.convert import load, save_safetensors
from models.convert.hf_config import from_hf, to_hf
from models.errors import InputError
from models.transformer_config import TransformerConfig
from tests.models import gguf_files

_CONFIG = TransformerConfig.tiny_gemma()


@pytest.fixture(scope="module")
def params():
  """Norms scale by numbers of which those of the files keep every bit."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == "scale":
      return jnp.asarray(rng.integers(-100, 500, leaf.shape) / 128, "float32")
    return jnp.asarray(rng.normal(size=leaf.shape), "float32")

  tree = transformer.abstract_params(_CONFIG)
  return jax.tree_util.tree_map_with_path(draw, tree)


def _json(folder, **changes):
  path = folder / "config.json"
  found = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in found.items() if v != ...}))


def _refusal(source):
  with pytest.raises(InputError) as caught:
    load(source)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_safetensors_make_the_round_trip(params, dtype, tmp_path):
  save_safetensors(tmp_path / "m", _CONFIG, params)
  found = load(tmp_path / "m", dtype)
  assert found.config == _CONFIG

  def expected(path, leaf):
    # A norm in 16 bits would lose what is less than 1 by much.
    return leaf if path[-1].key == "scale" else leaf.astype(dtype)

  expected = jax.tree_util.tree_map_with_path(expected, params)
  chex.assert_trees_all_equal(found.params, expected, strict=True)
  tensors = safetensors.numpy.load_file(tmp_path / "m/model.safetensors")
  written = tensors["model.layers.1.post_attention_layernorm.weight"]
  scale = params["layers"]["post_attn_norm"]["scale"][1]
  np.testing.assert_array_equal(written + 1, scale)


def test_gguf_equals_safetensors(params, tmp_path):
  gguf_files.write(tmp_path / "m.gguf", "gemma3", _shared(_CONFIG), params)
  found = load(tmp_path / "m.gguf")
  assert found.config == _shared(_CONFIG)
  chex.assert_trees_all_equal(found.params, params, strict=True)


def _shared(config):
  """With what files do not say: five of six layers slide, K divides scores."""
  changes = {name: getattr(config, name) for name in vars(config)}
  changes |= {"sliding": (True,) * 3, "query_scalar": 8.0}
  return TransformerConfig(**changes)


@pytest.mark.parametrize(
  "name", [n for n in vars(TransformerConfig) if n.startswith("gemma3_")]
)
def test_configs_of_all_sizes_make_the_round_trip(name):
  config = getattr(TransformerConfig, name)()
  hf = json.loads(json.dumps(to_hf(config, "bfloat16")))
  assert from_hf(hf, "x") == config
  # As version 4 of transformers wrote it, and inside of one with a tower.
  for key in ("rope_parameters", "layer_types"):
    del hf[key]
  assert from_hf(hf, "x") == config
  outer = {"model_type": "gemma3", "text_config": hf, "vision_config": {}}
  assert from_hf(outer, "x") == config


def test_a_silent_config_has_the_defaults_of_transformers():
  """The published 4B says no more than this."""
  text = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  }
  hf = {"model_type": "gemma3", "text_config": text}
  assert from_hf(hf, "x") == TransformerConfig.gemma3_4b()


def test_towers_are_left_out(params, tmp_path):
  save_safetensors(tmp_path, _CONFIG, params)
  path = tmp_path / "model.safetensors"
  own = safetensors.numpy.load_file(path)
  hf = json.loads((tmp_path / "config.json").read_text())
  outer = json.dumps({"model_type": "gemma3", "text_config": hf})
  (tmp_path / "config.json").write_text(outer)
  pixels = np.zeros((2, 2), np.float32)
  for text, tower in (
    ("language_model.model.", ""),
    ("model.language_model.", "model."),
  ):
    tensors = {n.replace("model.", text, 1): x for n, x in own.items()}
    tensors[f"{tower}vision_tower.vision_model.embeddings.weight"] = pixels
    tensors[f"{tower}multi_modal_projector.mm_soft_emb_norm.weight"] = pixels
    safetensors.numpy.save_file(tensors, path)
    found = load(tmp_path)
    assert found.config == _CONFIG
    chex.assert_trees_all_equal(found.params, params)


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ({"sliding_window": 0}, "sliding_window=0"),
    ({"sliding_window": 1}, "behind=0"),
    ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar=-1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"layer_types": ..., "sliding_window_pattern": "6"}, "window_pattern"),
    ({"hidden_size": ...}, "hidden_size is missing"),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "yarn"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
    ({"rope_parameters": 5}, "config.json"),
    ({"model_type": "gemma3", "text_config": None}, "text_config is missing"),
    ({"model_type": "gemma2"}, "gemma2"),
  ],
  ids=str,
)
def test_configs_are_refused_in_one_line(params, changes, part, tmp_path):
  save_safetensors(tmp_path, _CONFIG, params)
  _json(tmp_path, **changes)
  message = _refusal(tmp_path)
  assert "config.json" in message
  assert part in message


def test_a_missing_norm_is_named(params, tmp_path):
  save_safetensors(tmp_path / "m", _CONFIG, params)
  path = tmp_path / "m/model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  name = "model.layers.2.pre_feedforward_layernorm.weight"
  del tensors[name]
  safetensors.numpy.save_file(tensors, path)
  assert f"{name!r} is missing" in _refusal(tmp_path / "m")
  path = tmp_path / "m.gguf"
  name = "blk.2.post_ffw_norm.weight"
  gguf_files.write(path, "gemma3", _shared(_CONFIG), params, **{name: None})
  assert f"{name!r} is missing" in _refusal(path)


@pytest.mark.parametrize(
  ("key", "value", "part"),
  [
    ("attention.sliding_window", 0, "attention.sliding_window=0"),
    ("attention.sliding_window", None, "sliding_window is missing"),
    ("attention.sliding_window_pattern", "x", "sliding_window_pattern"),
    ("final_logit_softcapping", 30.0, "soft cap"),
    ("rope.freq_base_swa", -1.0, "freq_base_swa=-1.0"),
    ("block_count", 2**31, "block_count"),
  ],
)
def test_metadata_is_refused_in_one_line(key, value, part, tmp_path):
  path = tmp_path / "m.gguf"
  writer = gguf.GGUFWriter(path, "gemma3")
  values = {
    "embedding_length": 16,
    "attention.head_count": 2,
    "block_count": 2,
    "feed_forward_length": 16,
    "context_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.sliding_window": 4,
  } | {key: value}
  adders = {
    int: writer.add_uint32, float: writer.add_float32, str: writer.add_string
  }  # fmt: skip
  for name, one in values.items():
    if one is not None:
      adders[type(one)](f"gemma3.{name}", one)
  writer.add_tensor("token_embd.weight", np.zeros((32, 16), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  message = _refusal(path)
  assert "m.gguf" in message
  assert part in message


def test_models_of_no_family_are_not_exported():
  for changes in (
    {"post_norms": False},
    {"activation": "silu"},
    {"qkv_bias": True},
    {"qk_norm": False},
  ):
    config = TransformerConfig.tiny_gemma(**changes)
    with pytest.raises(InputError, match="Gemma 3"):
      to_hf(config, "float32")
  config = TransformerConfig.tiny(query_scalar=3.0)
  with pytest.raises(InputError, match="query_scalar=3.0 is of Gemma 3"):
    to_hf(config, "float32")


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    ({"sliding": [True, True, False]}, "no tuple of booleans"),
    ({"sliding": (True,)}, "1 entries for 3 layers"),
    ({"sliding": (False,) * 3}, "names no layer"),
    ({"behind": 0}, "behind=0"),
    ({"behind": True}, "behind=True"),
    ({"activation": "relu"}, "activation='relu'"),
    ({"query_scalar": 0}, "query_scalar=0"),
    ({"post_norms": 1}, "post_norms=1"),
  ],
)
def test_fields_are_checked(changes, part):
  with pytest.raises(InputError) as caught:
    TransformerConfig.tiny_gemma(**changes)
  assert part in str(caught.value)
