"""Logits of Mamba models against Hugging Face transformers.

`golden/generate_mamba.py` made the files; the weights go through the converter.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import language_model, mamba
from models.convert import load

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_FAMILIES = ("mamba1", "mamba2", "mamba2_groups")
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
def test_forward_prefill_and_decode_agree(name, tmp_path):
  checkpoint, tokens, logits = _read(name, tmp_path)
  config, params = checkpoint.config, checkpoint.params
  assert (config.kind, config.num_groups) == {
    "mamba1": ("mamba1", 1),
    "mamba2": ("mamba2", 1),
    "mamba2_groups": ("mamba2", 8),
  }[name]
  whole = jax.jit(language_model.forward, static_argnums=0)(
    config, params, tokens
  )
  assert whole.dtype == jnp.float32
  assert _relative_error(whole, logits) <= _TOLERANCE
  prefix = tokens.shape[1] - 7
  prefill = jax.jit(mamba.prefill, static_argnums=0)
  hidden, state = prefill(config, params, tokens[:, :prefix])
  parts = [mamba.bind(config, params).logits(hidden)]
  decode = jax.jit(mamba.decode, static_argnums=0)
  for t in range(prefix, tokens.shape[1]):
    step, state = decode(config, params, tokens[:, t : t + 1], state)
    parts.append(step)
  found = jnp.concatenate(parts, axis=1)
  assert _relative_error(found, logits) <= _TOLERANCE
  np.testing.assert_array_equal(state.length, tokens.shape[1])


@pytest.mark.parametrize("name", _FAMILIES)
def test_golden_files_cover_their_family(name):
  with np.load(_GOLDEN / f"{name}.npz") as file:
    config = json.loads(str(file["config"]))
    names = set(file.files)
    weights = {key: file[key] for key in names if key.endswith(("A_log", "D"))}
  assert (_GOLDEN / f"{name}.npz").stat().st_size <= 200_000
  assert config["num_hidden_layers"] == 2
  assert config.get("n_groups", 1) == (8 if name == "mamba2_groups" else 1)
  assert ("lm_head.weight" in names) == (name == "mamba2_groups")
  assert all(np.std(weight) > 0.1 for weight in weights.values())
