"""Directories with `config.json` and safetensors or `.bin` files."""

import pathlib
from typing import Any

from models import language_model
from models.convert import attamba, hf_config, mamba, names, quantized, shards
from models.convert.names import TensorSource
from models.convert.safetensors_io import INDEX, SINGLE, SafetensorsFile
from models.convert.torch_bin import Archive
from models.errors import InputError

_BIN = "pytorch_model.bin"
_FORMS = (
  (SINGLE, INDEX, SafetensorsFile),
  (_BIN, _BIN + ".index.json", Archive),
)
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
# What wrappers call their only child.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module",
             "_checkpoint_wrapped_module")  # fmt: skip
# Token tables of the families, by which a prefix of all names is found.
_TABLES = (_TABLE, *mamba.TABLES)
_ROTATION = "rotary_emb.inv_freq"


def open_directory(
  directory: pathlib.Path,
) -> tuple[language_model.Config, TensorSource]:
  """Opens a directory; reads no tensor yet.

  Raises:
    InputError: a file is missing, cut short or does not fit the others.
  """
  config_path = directory / "config.json"
  hf = shards.read_json(config_path) if config_path.exists() else None
  return _describe(hf, config_path, tensors(directory))


def open_bin(
  path: pathlib.Path,
) -> tuple[language_model.Config, TensorSource]:
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
) -> tuple[language_model.Config, TensorSource]:
  packed = (hf or {}).get("quantization_config")
  if packed and packed != quantized.CONFIG["quantization_config"]:
    raise InputError(
      f"{path}: quantization_config says that the weights are packed, in a "
      "form that is not read here: get the model before it was quantized, or "
      "a .gguf file of it"
    )
  source = _without_prefix(source)
  if attamba.describes(hf or {}):
    return attamba.from_json(hf, str(path)), source
  if mamba.describes(hf or {}) or (hf is None and mamba.is_megatron(source)):
    return mamba.open_source(hf, str(path), source)
  if hf is None:
    raise InputError(f"{path}: is missing: get the checkpoint again")
  config = hf_config.from_hf(hf, str(path))
  config, source = names.with_own_head(config, source, _HEAD, _TABLE)
  # Rotation tables that old exporters wrote; they follow from the config.
  rotations = [n for n in source.names if n.endswith(_ROTATION)]
  return config, source.without(rotations)


def _without_prefix(source: TensorSource) -> TensorSource:
  """The tensors without what wrappers put in front of all their names.

  `torch.compile` writes `_orig_mod.`, data-parallel training `module.`. A base
  model without its head has no `model.` or `backbone.`. Layers that were
  wrapped one by one have such parts in the midst of their names.
  """
  plain = {name: _unwrapped(name) for name in source.names}
  # Two tensors of one name are left for the message that one is unknown.
  if len(set(plain.values())) == len(plain):
    source = source.renamed(_unwrapped)
  if any(table in source.names for table in _TABLES):
    return source
  for table in _TABLES:
    body, bare = table.split(".", 1)
    for name in sorted(source.names):
      if name.endswith("." + table):
        prefix = name.removesuffix(table)
        return source.renamed(lambda n, p=prefix: n.removeprefix(p))
      if name == bare or name.endswith("." + bare):
        prefix = name.removesuffix(bare)
        return source.renamed(
          lambda n, p=prefix, b=body: n if n == _HEAD else _in(b, n, p)
        )
  return source


def _unwrapped(name: str) -> str:
  return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _in(body: str, name: str, prefix: str) -> str:
  return f"{body}.{name.removeprefix(prefix)}"
