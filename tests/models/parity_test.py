"""Logits against Hugging Face transformers, for every family.

`golden/generate.py` made the files; the weights go through the converter.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import language_model, transformer
from models.convert import load

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_FAMILIES = ("llama3", "smollm2", "qwen2", "qwen3", "gemma3")
_TOLERANCE = 1e-4


def _read(name, directory):
  with np.load(_GOLDEN / f"{name}.npz") as file:
    arrays = dict(file)
  (directory / "config.json").write_text(str(arrays.pop("config")))
  tokens, logits = arrays.pop("tokens"), arrays.pop("logits")
  safetensors.numpy.save_file(arrays, directory / "model.safetensors")
  return load(directory), jnp.asarray(tokens), logits


def _relative_error(actual, expected):
  difference = np.asarray(actual, np.float64) - expected
  return np.linalg.norm(difference) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", _FAMILIES)
def test_forward_agrees(name, tmp_path):
  checkpoint, tokens, logits = _read(name, tmp_path)
  actual = language_model.forward(checkpoint.config, checkpoint.params, tokens)
  assert actual.dtype == jnp.float32
  assert _relative_error(actual, logits) <= _TOLERANCE


@pytest.mark.parametrize("name", _FAMILIES)
def test_prefill_then_decode_agrees(name, tmp_path):
  checkpoint, tokens, logits = _read(name, tmp_path)
  config, params = checkpoint.config, checkpoint.params
  prefix = tokens.shape[1] // 2
  hidden, state = transformer.prefill(
    config, params, tokens[:, :prefix], cache_size=tokens.shape[1] + 3
  )
  decode = jax.jit(transformer.decode, static_argnums=0)
  parts = [transformer.bind(config, params).logits(hidden)]
  for t in range(prefix, tokens.shape[1]):
    step, state = decode(config, params, tokens[:, t : t + 1], state)
    parts.append(step)
  actual = jnp.concatenate(parts, axis=1)
  assert _relative_error(actual, logits) <= _TOLERANCE
  np.testing.assert_array_equal(state.length, tokens.shape[1])


@pytest.mark.parametrize("name", _FAMILIES)
def test_golden_files_cover_their_family(name):
  with np.load(_GOLDEN / f"{name}.npz") as file:
    config = json.loads(str(file["config"]))
    names = set(file.files)
  assert (_GOLDEN / f"{name}.npz").stat().st_size <= 200_000
  assert config["num_key_value_heads"] < config["num_attention_heads"]
  rope = config["rope_parameters"]
  rope_type = rope.get("full_attention", rope)["rope_type"]
  assert (rope_type == "llama3") == (name == "llama3")
  attention = "model.layers.0.self_attn."
  assert (attention + "q_proj.bias" in names) == (name == "qwen2")
  normed = name in ("qwen3", "gemma3")
  assert (attention + "k_norm.weight" in names) == normed
  assert ("lm_head.weight" in names) == (name in ("llama3", "qwen3"))
