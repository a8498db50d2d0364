"""`config.json` of Attamba checkpoints to `AttambaConfig` and back."""

import dataclasses
from typing import Any

from models import input_files
from models.attamba_config import AttambaConfig
from models.errors import InputError, shown

_KIND = "attamba"


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
