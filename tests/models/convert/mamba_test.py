import dataclasses
import json
import pickle
import struct
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import mamba
from models.convert import hub, load, save_safetensors
from models.convert import mamba as convert
from models.errors import InputError
from models.mamba_config import MambaConfig

_CHANGES = {
  "mamba1": ("mamba1", {}),
  "mamba1_rank": ("mamba1", {"dt_rank": 5, "vocab_size": 61}),
  "mamba2": ("mamba2", {}),
  "mamba2_untied": ("mamba2", {"num_groups": 2, "tie_embeddings": False}),
  "hybrid": ("hybrid", {}),
}
_CONFIGS = {
  name: MambaConfig.tiny(
    kind, **({"vocab_size": 64, "vocab_multiple": 1} | changes)
  )
  for name, (kind, changes) in _CHANGES.items()
}
# As state-spaces and nvidia publish their models.
_MAMBA_SSM = {
  "mamba1": {"ssm_cfg": {}, "pad_vocab_size_multiple": 8},
  "mamba2": {
    "ssm_cfg": {"layer": "Mamba2"},
    "pad_vocab_size_multiple": 16,
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "tie_embeddings": True,
  },
}
_ALWAYS = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
_IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"


def _params(config, dtype=jnp.float32):
  # Biases and scales too are random, so that a swap of two would show.
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), dtype),
    mamba.abstract_params(config),
  )


def _write(directory, config, dtype=jnp.float32):
  params = _params(config, dtype)
  save_safetensors(directory, config, params)
  return params


def _tensors(directory):
  return safetensors.numpy.load_file(directory / "model.safetensors")


def _mamba_ssm_json(config):
  ssm = {"d_state": config.d_state}
  if config.kind == "mamba2":
    ssm |= {
      "layer": "Mamba2",
      "headdim": config.head_dim,
      "ngroups": config.num_groups,
      "chunk_size": 256,
    }
  return _ALWAYS | {
    "d_model": config.d_model,
    "n_layer": config.num_layers,
    "vocab_size": config.vocab_size,
    "pad_vocab_size_multiple": config.vocab_multiple,
    "ssm_cfg": ssm,
    "tie_embeddings": config.tie_embeddings,
  }


def _mamba_ssm_tensors(directory, config):
  """The tensors of an export, as mamba_ssm names them."""
  tensors = _tensors(directory)
  table = tensors.pop("backbone.embeddings.weight")
  tensors["backbone.embedding.weight"] = table
  return tensors | {"lm_head.weight": tensors.get("lm_head.weight", table)}


def _put(directory, json_config, tensors):
  directory.mkdir()
  if json_config is not None:
    (directory / "config.json").write_text(json.dumps(json_config))
  if tensors is not None:
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
  return directory


def _write_bin(path, tensors):
  """As `torch.save` would write it."""
  kinds = {"float32": b"Float", "float16": b"Half", "bfloat16": b"BFloat16"}
  text = lambda t: b"X" + struct.pack("<I", len(t)) + t.encode()
  value = lambda v: pickle.dumps(v, 2)[2:-1]
  body = b"\x80\x02}"
  with zipfile.ZipFile(path, "w") as archive:
    for key, (name, array) in enumerate(tensors.items()):
      archive.writestr(f"archive/data/{key}", array.tobytes())
      strides = tuple(s // array.itemsize for s in array.strides)
      body += (
        text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
      )
      body += b"ctorch\n" + kinds[array.dtype.name] + b"Storage\n"
      body += text(str(key)) + text("cpu") + value(array.size) + b"tQK\x00"
      body += value(array.shape) + value(strides) + b"\x89"
      body += b"ccollections\nOrderedDict\n)RtRs"
    archive.writestr("archive/data.pkl", body + b".")


def _fails(source, *parts):
  with pytest.raises(InputError) as caught:
    load(source)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert str(part) in message, message


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", _CONFIGS)
def test_the_round_trip_is_bit_exact(name, dtype, tmp_path):
  params = _write(tmp_path / "model", _CONFIGS[name], dtype)
  checkpoint = load(tmp_path / "model", dtype)
  assert checkpoint.config == _CONFIGS[name]
  chex.assert_trees_all_equal(checkpoint.params, params, strict=True)
  save_safetensors(tmp_path / "again", checkpoint.config, checkpoint.params)
  for file in ("model.safetensors", "config.json"):
    one, other = (tmp_path / part / file for part in ("model", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_what_the_recurrence_exponentiates_is_not_rounded(tmp_path):
  params = _write(tmp_path, _CONFIGS["mamba2"])
  found = load(tmp_path, jnp.bfloat16).params["layers"][0]["mixer"]
  mixer = params["layers"][0]["mixer"]
  for name in ("A_log", "D", "dt_bias"):
    chex.assert_trees_all_equal(found[name], mixer[name], strict=True)
  assert found["in_proj"]["kernel"].dtype == jnp.bfloat16
  assert found["conv"]["weight"].dtype == jnp.bfloat16


def test_tensors_lie_as_transformers_has_them(tmp_path):
  config = _CONFIGS["mamba2_untied"]
  params = _write(tmp_path, config)
  tensors = _tensors(tmp_path)
  mixer = params["layers"][0]["mixer"]
  prefix = "backbone.layers.1.mixer."
  kernel, conv = mixer["in_proj"]["kernel"], mixer["conv"]["weight"]
  np.testing.assert_array_equal(tensors[_IN_PROJ], kernel[1].T)
  found = tensors[prefix + "conv1d.weight"]
  assert found.shape == (config.conv_channels, 1, config.d_conv)
  np.testing.assert_array_equal(found[:, 0], conv[1])
  np.testing.assert_array_equal(
    tensors[prefix + "dt_bias"], mixer["dt_bias"][1]
  )
  assert tensors["lm_head.weight"].shape == (64, 32)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["mamba1", "mamba2", "mamba2_untied"])
def test_the_form_of_mamba_ssm(name, form, tmp_path):
  config = _CONFIGS[name]
  params = _write(tmp_path / "hf", config)
  tensors = _mamba_ssm_tensors(tmp_path / "hf", config)
  is_bin = form == "bin"
  directory = _put(
    tmp_path / "own", _mamba_ssm_json(config), None if is_bin else tensors
  )
  sources = [directory]
  if is_bin:
    _write_bin(directory / "pytorch_model.bin", tensors)
    sources.append(directory / "pytorch_model.bin")
  for source in sources:
    checkpoint = load(source)
    assert checkpoint.config == config
    chex.assert_trees_all_equal(checkpoint.params, params, strict=True)


def test_bin_files_in_shards_and_of_half_precision(tmp_path):
  config = _CONFIGS["mamba1"]
  params = _write(tmp_path / "hf", config, jnp.bfloat16)
  tensors = _mamba_ssm_tensors(tmp_path / "hf", config)
  directory = _put(tmp_path / "own", _mamba_ssm_json(config), None)
  weight_map = {}
  for part in (0, 1):
    names = sorted(tensors)[part::2]
    file = f"pytorch_model-0000{part + 1}-of-00002.bin"
    _write_bin(directory / file, {name: tensors[name] for name in names})
    weight_map |= dict.fromkeys(names, file)
  index = directory / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  found = load(directory, jnp.bfloat16).params
  chex.assert_trees_all_equal(found, params, strict=True)
  (directory / weight_map["lm_head.weight"]).unlink()
  _fails(directory, weight_map["lm_head.weight"], "missing")


def _megatron(tensors, fused):
  norm = ".mixer.in_proj.layer_norm_weight" if fused else ".norm.weight"
  fixed = {
    "backbone.embeddings.weight": "embedding.word_embeddings.weight",
    "backbone.norm_f.weight": "decoder.final_norm.weight",
    "lm_head.weight": "output_layer.weight",
  }
  found = {"decoder.layers.0.mixer.in_proj._extra_state": np.zeros(3, "u1")}
  for name, tensor in tensors.items():
    own = name.replace("backbone.layers", "decoder.layers")
    if not own.endswith(".mixer.norm.weight"):
      own = own.replace(".norm.weight", norm)
    found[fixed.get(name, own)] = tensor
  return found


@pytest.mark.parametrize("fused", [False, True])
def test_the_names_of_megatron(fused, tmp_path):
  config = MambaConfig.tiny(
    num_groups=2,
    d_state=128,
    tie_embeddings=False,
    vocab_size=128,
    vocab_multiple=128,
  )
  params = _write(tmp_path / "hf", config)
  tensors = _megatron(_tensors(tmp_path / "hf"), fused)
  checkpoint = load(_put(tmp_path / "own", None, tensors))
  assert checkpoint.config == config
  chex.assert_trees_all_equal(checkpoint.params, params, strict=True)
  # With the config that its converters write, too.
  json_config = _mamba_ssm_json(config) | {"pad_vocab_size_multiple": 128}
  checkpoint = load(_put(tmp_path / "both", json_config, tensors))
  assert checkpoint.config == config
  chex.assert_trees_all_equal(checkpoint.params, params, strict=True)


def test_megatron_of_another_shape_asks_for_a_config(tmp_path):
  config = MambaConfig.tiny(d_state=24)
  _write(tmp_path / "hf", config)
  tensors = _megatron(_tensors(tmp_path / "hf"), False)
  directory = _put(tmp_path / "own", None, tensors)
  _fails(directory, directory / "config.json", "mamba2-2.7b")


@pytest.mark.parametrize(
  ("name", "layers", "width"),
  [
    ("mamba_130m", 24, 768),
    ("mamba_2_8b", 64, 2560),
    ("mamba2_2_7b", 64, 2560),
  ],
)
def test_published_configs(name, layers, width):
  kind = "mamba2" if name.startswith("mamba2") else "mamba1"
  published = _ALWAYS | _MAMBA_SSM[kind]
  published |= {"d_model": width, "n_layer": layers, "vocab_size": 50277}
  expected = getattr(MambaConfig, name)()
  assert convert.from_json(published, "") == expected
  hf = convert.to_hf(expected, "float32")
  found = convert.from_json(hf, "")
  assert found == dataclasses.replace(expected, vocab_multiple=1)
  # Older exports of this project have padded tables.
  hf |= {
    "vocab_size": expected.padded_vocab_size,
    "unpadded_vocab_size": expected.vocab_size,
    "pad_vocab_size_multiple": expected.vocab_multiple,
  }
  assert convert.from_json(hf, "") == expected


def test_padding_of_the_vocabulary_is_read_and_not_written(tmp_path):
  config = _CONFIGS["mamba2_untied"]
  params = _write(tmp_path / "hf", config)
  # A vocabulary is padded to a multiple of 8 where mamba_ssm does not say it.
  silent = _mamba_ssm_json(config) | {"vocab_size": 61}
  del silent["pad_vocab_size_multiple"]
  tensors = _mamba_ssm_tensors(tmp_path / "hf", config)
  checkpoint = load(_put(tmp_path / "own", silent, tensors))
  padded = dataclasses.replace(config, vocab_size=61, vocab_multiple=8)
  assert checkpoint.config == padded
  chex.assert_trees_all_equal(checkpoint.params, params, strict=True)
  save_safetensors(tmp_path / "again", padded, checkpoint.params)
  again = load(tmp_path / "again")
  assert again.config == dataclasses.replace(padded, vocab_multiple=1)
  for found, table in (
    (again.params["embed"]["table"], params["embed"]["table"]),
    (again.params["lm_head"]["kernel"].T, params["lm_head"]["kernel"].T),
  ):
    np.testing.assert_array_equal(found, table[:61])


def test_a_head_shows_where_the_config_is_silent(tmp_path):
  config = _CONFIGS["mamba2"]
  params = _write(tmp_path / "hf", config)
  tensors = _mamba_ssm_tensors(tmp_path / "hf", config)
  silent = _mamba_ssm_json(config)
  del silent["tie_embeddings"]
  checkpoint = load(_put(tmp_path / "tied", silent, tensors))
  assert checkpoint.config == config
  chex.assert_trees_all_equal(checkpoint.params, params, strict=True)
  tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
  checkpoint = load(_put(tmp_path / "untied", silent, tensors))
  assert not checkpoint.config.tie_embeddings
  np.testing.assert_array_equal(
    checkpoint.params["lm_head"]["kernel"], tensors["lm_head.weight"].T
  )


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    ({"attn_layer_idx": [1]}, "attn_layer_idx"),
    ({"d_intermediate": 8}, "d_intermediate"),
    ({"rms_norm": False}, "rms_norm"),
    ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
    ({"ssm_cfg": {"bias": True}}, "bias"),
    ({"ssm_cfg": {"wings": 2}}, "ssm_cfg.wings"),
    ({"vocab_size": None}, "vocab_size"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 24}}, "head_dim=24"),
    ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "head_dim=0"),
    ({"d_model": "32"}, "d_model='32'"),
  ],
)
def test_unsupported_configs_of_mamba_ssm(changes, part, tmp_path):
  _write(tmp_path / "hf", _CONFIGS["mamba1"])
  values = _mamba_ssm_json(_CONFIGS["mamba1"]) | changes
  values = {k: v for k, v in values.items() if v is not None}
  tensors = _tensors(tmp_path / "hf")
  directory = _put(tmp_path / "own", values, tensors)
  _fails(directory, directory / "config.json", part)


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    ({"use_bias": True}, "use_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"time_step_limit": [0.0, 0.5]}, "time_step_limit"),
    ({"time_step_limit": [0.1, float("inf")]}, "time_step_limit"),
    ({"num_heads": 3}, "num_heads=3"),
    ({"state_size": None}, "state_size"),
    ({"n_groups": 3}, "num_groups=3"),
  ],
)
def test_unsupported_configs_of_transformers(changes, part, tmp_path):
  _write(tmp_path, _CONFIGS["mamba2"])
  path = tmp_path / "config.json"
  values = json.loads(path.read_text()) | changes
  path.write_text(
    json.dumps({k: v for k, v in values.items() if v is not None})
  )
  _fails(tmp_path, path, part)


@pytest.mark.parametrize(
  "limit", [[0.0, float("inf")], [0, {"__float__": "Infinity"}], [0, None]]
)
def test_steps_without_bound_are_written_in_several_ways(limit):
  hf = convert.to_hf(_CONFIGS["mamba2"], "float32") | {"time_step_limit": limit}
  assert convert.from_json(hf, "") == _CONFIGS["mamba2"]


def test_missing_unknown_and_misshapen_tensors_have_their_own_names(tmp_path):
  config = _CONFIGS["mamba1"]
  _write(tmp_path / "hf", config)
  tensors = _mamba_ssm_tensors(tmp_path / "hf", config)
  table = "backbone.embedding.weight"
  cases = [
    ({_IN_PROJ: None}, _IN_PROJ, "missing"),
    ({"backbone.layers.0.mixer.wing": np.zeros(2, "f4")}, "wing", "Mamba"),
    ({table: np.zeros((64, 33), "f4")}, f"'{table}'", "(64, 33)", "(64, 32)"),
  ]
  for i, (changes, *parts) in enumerate(cases):
    changed = {k: v for k, v in (tensors | changes).items() if v is not None}
    directory = _put(tmp_path / str(i), _mamba_ssm_json(config), changed)
    _fails(directory, directory / "model.safetensors", *parts)


def test_a_bin_file_that_is_no_checkpoint(tmp_path):
  json_config = _mamba_ssm_json(_CONFIGS["mamba1"])
  directory = _put(tmp_path / "own", json_config, None)
  path = directory / "pytorch_model.bin"
  path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
  _fails(directory, path, "no file of PyTorch 1.6")
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", b"cos\nsystem\n(X\x02\x00\x00\x00lstR.")
  _fails(directory, path, "os.system", "refused")
  _fails(path, path, "os.system", "refused")
  path.unlink()
  _fails(directory, "neither model.safetensors", "pytorch_model.bin")


def test_bin_files_are_downloaded_where_there_are_no_safetensors(
  tmp_path, monkeypatch
):
  config, asked = _CONFIGS["mamba1"], []
  params = _write(tmp_path / "hf", config)
  tensors = _mamba_ssm_tensors(tmp_path / "hf", config)
  directory = _put(tmp_path / "own", _mamba_ssm_json(config), None)

  def download(hub_id, allow_patterns, **kwargs):
    asked.append(allow_patterns)
    if any("pytorch_model" in pattern for pattern in allow_patterns):
      _write_bin(directory / "pytorch_model.bin", tensors)
    return str(directory)

  monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
  checkpoint = load("state-spaces/mamba-tiny")
  assert checkpoint.name == "mamba-tiny"
  chex.assert_trees_all_equal(checkpoint.params, params, strict=True)
  assert len(asked) == 2 and "*.safetensors" in asked[0]
