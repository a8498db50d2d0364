"""Directories with `config.json` and safetensors or `.bin` files."""

import pathlib
from typing import Any

from models.convert import hf_config, mamba, shards
from models.convert.names import TensorSource
from models.convert.safetensors_io import INDEX, SINGLE, SafetensorsFile
from models.convert.torch_bin import Archive
from models.errors import InputError
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig

_BIN = "pytorch_model.bin"
_FORMS = (
  (SINGLE, INDEX, SafetensorsFile),
  (_BIN, _BIN + ".index.json", Archive),
)
_HEAD = "lm_head.weight"
_ROTATION = "rotary_emb.inv_freq"


def open_directory(
  directory: pathlib.Path,
) -> tuple[TransformerConfig | MambaConfig, TensorSource]:
  """Opens a directory; reads no tensor yet.

  Raises:
    InputError: a file is missing, cut short or does not fit the others.
  """
  config_path = directory / "config.json"
  hf = shards.read_json(config_path) if config_path.exists() else None
  return _describe(hf, config_path, tensors(directory))


def open_bin(
  path: pathlib.Path,
) -> tuple[TransformerConfig | MambaConfig, TensorSource]:
  """Opens a `.bin` file of PyTorch, with the `config.json` beside it.

  Raises:
    InputError: a file is missing, cut short or does not fit the other.
  """
  config_path = path.parent / "config.json"
  hf = shards.read_json(config_path) if config_path.exists() else None
  return _describe(hf, config_path, shards.open_file(path, Archive))


def tensors(directory: pathlib.Path) -> TensorSource:
  """The tensors, from safetensors where there are both."""
  for single, index, opener in _FORMS:
    if (directory / single).exists():
      return shards.open_file(directory / single, opener)
    if (directory / index).exists():
      return shards.open_index(directory / index, opener)
  raise InputError(
    f"{directory}: has neither {SINGLE} nor {INDEX}, nor {_BIN}: give a "
    "directory with safetensors and config.json"
  )


def _describe(
  hf: dict[str, Any] | None, path: pathlib.Path, source: TensorSource
) -> tuple[TransformerConfig | MambaConfig, TensorSource]:
  if mamba.describes(hf or {}) or (hf is None and mamba.is_megatron(source)):
    return mamba.open_source(hf, str(path), source)
  if hf is None:
    raise InputError(f"{path}: is missing: get the checkpoint again")
  has_head = _HEAD in source.names
  config = hf_config.from_hf(hf, str(path), has_head=has_head)
  if config.tie_embeddings:
    # Some exporters write the tied head a second time; it is never read.
    source = source.without([_HEAD])
  # Rotation tables that old exporters wrote; they follow from the config.
  rotations = [name for name in source.names if name.endswith(_ROTATION)]
  return config, source.without(rotations)
