"""Attamba checkpoints: `config.json`, tensor names, and the way back.

The form is our own, since no library computes the model: names are those of
Llama, and below `self_attn` those of Mamba.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from models import attamba, input_files
from models.attamba_config import AttambaConfig
from models.convert.names import Leaf, leaves_of_runs
from models.errors import InputError, shown

_KIND = "attamba"
_TEMPLATES = {
  "embed.table": "model.embed_tokens.weight",
  "final_norm.scale": "model.norm.weight",
  "lm_head.kernel": "lm_head.weight",
  "chunk_costs": "model.chunk_costs",
}
_LAYER = "model.layers.{}."
_LAYER_TEMPLATES = {
  "attn_norm.scale": "input_layernorm.weight",
  "mlp_norm.scale": "post_attention_layernorm.weight",
  "attn.gate_bias": "self_attn.gate_bias",
  **{
    f"attn.{name}_proj.kernel": f"self_attn.{name}_proj.weight"
    for name in ("q", "k", "v", "o", "gate")
  },
  **{
    f"mlp.{name}_proj.kernel": f"mlp.{name}_proj.weight"
    for name in ("gate", "up", "down")
  },
  **{
    f"attn.{space}.{ours}": f"self_attn.{space}.{theirs}"
    for space in ("k_ssm", "v_ssm")
    for ours, theirs in (
      ("in_proj.kernel", "in_proj.weight"),
      ("conv.weight", "conv1d.weight"),
      ("conv.bias", "conv1d.bias"),
      ("dt_bias", "dt_bias"),
      ("A_log", "A_log"),
      ("D", "D"),
      ("norm.scale", "norm.weight"),
      ("out_proj.kernel", "out_proj.weight"),
    )
  },
}
# These keep a file's wider dtype, because the recurrence exponentiates the
# first three, which are few, and costs are summed.
_KEEPS_DTYPE = ("A_log", "D", "dt_bias", "chunk_costs")


def leaves(config: AttambaConfig) -> Iterator[Leaf]:
  """Yields every parameter array that `config` calls for."""
  yield from leaves_of_runs(
    attamba.abstract_params(config),
    config.runs,
    _TEMPLATES,
    lambda name: _LAYER + _LAYER_TEMPLATES[name],
    _KEEPS_DTYPE,
  )


def describes(json: dict[str, Any]) -> bool:
  """Whether a `config.json` is of an Attamba."""
  return json.get("model_type") == _KIND


def from_json(json: dict[str, Any], path: str) -> AttambaConfig:
  """Reads a config that `to_hf` wrote.

  Args:
    json: the parsed `config.json`.
    path: of that file, for messages.

  Raises:
    InputError: a key is missing or unknown, or sizes do not fit.
  """
  with input_files.errors_of_config(path):
    given = json.get("config")
    if not isinstance(given, dict):
      raise InputError(f"config={shown(given)} is no object: get it again")
    fields = dataclasses.fields(AttambaConfig)
    known = {field.name for field in fields}
    for key in sorted(given.keys() - known, key=str):
      raise InputError(f"config.{shown(key)[1:-1]} is unknown: get it again")
    for field in fields:
      if field.default is dataclasses.MISSING and field.name not in given:
        raise InputError(f"config.{field.name} is missing: get it again")
    sizes = given["chunk_sizes"]
    sizes = tuple(sizes) if isinstance(sizes, list) else sizes
    return AttambaConfig(**(given | {"chunk_sizes": sizes}))


def to_hf(config: AttambaConfig, dtype: str) -> dict[str, Any]:
  """The `config.json` of `config`.

  Args:
    config: of the model.
    dtype: of the weights, "float32" or "bfloat16".
  """
  return {
    "model_type": _KIND,
    "torch_dtype": dtype,
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.tie_embeddings,
    "config": dataclasses.asdict(config),
  }
