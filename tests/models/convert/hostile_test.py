"""Checkpoints that lie: configs of wrong types, sizes beyond the file."""

import io
import json
import pickle
import struct
import zipfile

import gguf
import numpy as np
import pytest
import safetensors.numpy

from models.convert import directory, gguf_io, llama2c, load, names, torch_bin
from models.errors import InputError

_HF = {
  "model_type": "llama",
  "vocab_size": 32,
  "num_hidden_layers": 2,
  "hidden_size": 16,
  "intermediate_size": 16,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 8,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 256,
}
_MAMBA = {
  "model_type": "mamba2",
  "vocab_size": 61,
  "num_hidden_layers": 2,
  "hidden_size": 32,
  "state_size": 16,
  "head_dim": 16,
  "n_groups": 1,
  "num_heads": 4,
}
_VALUES = ("x", [], {}, -1, 0, 2.5, 2**60, 10**400, float("nan"))


def _fails(call, *args):
  with pytest.raises(InputError) as caught:
    call(*args)
  line = str(caught.value)
  assert "\n" not in line and len(line) <= 1000
  return line


def _folder(path, hf):
  (path / "config.json").write_text(json.dumps(hf))
  safetensors.numpy.save_file(
    {"model.embed_tokens.weight": np.zeros((32, 16), np.float32)},
    path / "model.safetensors",
  )
  return path


@pytest.mark.parametrize("value", _VALUES, ids=repr)
@pytest.mark.parametrize(
  ("hf", "key"),
  [(_HF, key) for key in _HF if key != "model_type"]
  + [(_HF, "rope_theta"), (_HF, "rope_scaling"), (_HF, "tie_word_embeddings")]
  + [(_MAMBA, key) for key in _MAMBA if key != "model_type"]
  + [(_MAMBA, "layer_norm_epsilon"), (_MAMBA, "time_step_limit")]
  + [(_MAMBA, "attention_layers"), (_MAMBA, "stack_splits")],
)
def test_configs_of_wrong_types_are_told(tmp_path, hf, key, value):
  if (key, value) in (("rope_scaling", []), ("rope_scaling", {})):
    value = 1.5
  if (key, value) in (("rope_scaling", 0), ("stack_splits", [])):
    value = "ab"
  if key == "stack_splits" and value == {}:
    value = 2
  line = _fails(load, _folder(tmp_path, hf | {key: value}))
  assert "config.json" in line or "model.safetensors" in line


@pytest.mark.parametrize("layers", [5, 4096, 10**9])
@pytest.mark.parametrize("hf", [_HF, _MAMBA])
def test_layers_are_compared_with_the_file(tmp_path, hf, layers):
  line = _fails(load, _folder(tmp_path, hf | {"num_hidden_layers": layers}))
  assert str(layers) in line


@pytest.mark.parametrize(
  "name", ["/etc/passwd", "../model.safetensors", 7, None, [], "none"]
)
def test_an_index_stays_in_its_folder(tmp_path, name):
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(_HF))
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": {"model.embed_tokens.weight": name}})
  )
  assert str(folder) in _fails(directory.open_directory, folder)


def _gguf(path, change):
  writer = gguf.GGUFWriter(path, "llama")
  values = {
    "embedding_length": 16,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "block_count": 2,
    "feed_forward_length": 16,
    "context_length": 64,
  } | change
  for key, value in values.items():
    add = writer.add_uint32 if isinstance(value, int) else writer.add_string
    add = writer.add_array if isinstance(value, list) else add
    add(f"llama.{key}", value)
  writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
  writer.add_tensor("token_embd.weight", np.zeros((32, 16), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("value", [0, 2**31, "two", [1, 1]], ids=repr)
@pytest.mark.parametrize(
  "key",
  [
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "block_count",
    "feed_forward_length",
    "context_length",
  ],
)
def test_metadata_of_wrong_types_is_told(tmp_path, key, value):
  assert "m.gguf" in _fails(load, _gguf(tmp_path / "m.gguf", {key: value}))


@pytest.mark.parametrize("size", [2**60, 2**63, 2**64 - 1, 10**6])
@pytest.mark.parametrize("part", ["string", "array", "count", "tensors"])
def test_gguf_sizes_are_compared_with_the_file(tmp_path, part, size):
  path = tmp_path / "m.gguf"
  long = struct.pack("<Q", size)
  text = lambda word: struct.pack("<Q", len(word)) + word
  count = struct.pack("<Q", 1)
  body = {
    "string": count + count + long + b"general",
    "array": count + count + text(b"a") + struct.pack("<II", 9, 0) + long,
    "count": bytes(8) + long,
    "tensors": long + bytes(8),
  }[part]
  path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
  assert "m.gguf" in _fails(gguf_io.open_gguf, path)


def test_tensors_do_not_share_bytes_of_a_gguf(tmp_path):
  path = _gguf(tmp_path / "m.gguf", {})
  assert load_config(path).num_layers == 2
  data = path.read_bytes()
  shape = struct.pack("<QQ", 16, 32)
  assert data.count(shape) == 1
  path.write_bytes(data.replace(shape, struct.pack("<QQ", 2**33, 2**31)))
  assert "m.gguf" in _fails(gguf_io.open_gguf, path)


def load_config(path):
  return gguf_io.read_config(gguf_io.open_gguf(path), str(path))


@pytest.mark.parametrize("layers", [2**31 - 1, 2**30, 4000])
def test_layers_of_llama2c_are_compared_with_the_file(tmp_path, layers):
  path = tmp_path / "m.bin"
  path.write_bytes(struct.pack("<7i", 64, 64, layers, 8, 4, 512, 512))
  assert "m.bin" in _fails(load, path)


def _laughs():
  value = ()
  for _ in range(200):
    value = (value, value, value)
  return value


def _deep_list():
  return b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."


@pytest.mark.parametrize(
  "pickled",
  [
    pickle.dumps({"a": _laughs()}, 2),
    # The tuple is the key: it would be hashed.
    pickle.dumps(_laughs(), 2)[:-1].replace(b"\x80\x02", b"\x80\x02}", 1)
    + b"K\x01s.",
    _deep_list(),
    b"\x80\x02" + b"(" * 50_000 + b"]" + b"t" * 50_000 + b".",
    b"\x80\x02aaaa.",
  ],
)
def test_pickles_that_never_end_are_refused(tmp_path, pickled):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w") as archive:
    archive.writestr("m/data.pkl", pickled)
  path = tmp_path / "m.bin"
  path.write_bytes(stream.getvalue())
  assert "m.bin" in _fails(torch_bin.Archive, path)


def test_rows_of_an_empty_tensor_are_reordered():
  assert names.half_split_rows(np.zeros((8, 0)), 2).shape == (8, 0)


def test_llama2c_reads_no_pipe(tmp_path):
  assert str(tmp_path) in _fails(llama2c.read_config, tmp_path)


@pytest.mark.parametrize("hf", [_HF, _MAMBA])
def test_sizes_of_a_config_that_are_huge_together_are_told(tmp_path, hf):
  sizes = [key for key in hf if isinstance(hf[key], int)]
  huge = hf | dict.fromkeys(sizes, 2**31 - 2) | {"num_hidden_layers": 1}
  for key in sizes:
    _fails(load, _folder(tmp_path, huge | {key: hf[key]}))
    line = _fails(load, _folder(tmp_path, hf | {key: 2**31 - 2}))
    assert "config.json" in line or "model.safetensors" in line
