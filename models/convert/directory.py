"""Directories with `config.json` and safetensors or `.bin` files."""

import pathlib
import re
from typing import Any

from models import language_model
from models.attamba_config import AttambaConfig
from models.convert import folder, mamba, names, shards
from models.convert.names import TensorSource
from models.convert.safetensors_io import SafetensorsFile
from models.convert.torch_bin import Archive
from models.errors import InputError
from models.mamba_config import MambaConfig

_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
# What wrappers call their only child.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module",
             "_checkpoint_wrapped_module")  # fmt: skip
# Token tables of the families, by which a prefix of all names is found.
_TABLES = (_TABLE, *mamba.TABLES)
_ROTATION = "rotary_emb.inv_freq"
# What models that see pictures have beside their text model.
_VISION = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")


def open_directory(
  directory: pathlib.Path,
) -> tuple[language_model.Config, TensorSource]:
  """Opens a directory; reads no tensor yet.

  Raises:
    InputError: a file is missing, cut short or does not fit the others.
  """
  config_path = directory / folder.CONFIG
  hf = folder.read_config(config_path)
  return _describe(hf, config_path, tensors(directory))


def open_bin(
  path: pathlib.Path,
) -> tuple[language_model.Config, TensorSource]:
  """Opens a `.bin` file of PyTorch, with the `config.json` beside it.

  Raises:
    InputError: a file is missing, cut short or does not fit the other.
  """
  config_path = path.parent / folder.CONFIG
  hf = folder.read_config(config_path)
  return _describe(hf, config_path, shards.open_file(path, Archive))


def tensors(directory: pathlib.Path) -> TensorSource:
  """The tensors, from safetensors where there are both."""
  path = folder.weights(directory)
  opener = SafetensorsFile if ".safetensors" in path.name else Archive
  open_them = shards.open_index if path.suffix == ".json" else shards.open_file
  return open_them(path, opener)


def _describe(
  hf: dict[str, Any] | None, path: pathlib.Path, source: TensorSource
) -> tuple[language_model.Config, TensorSource]:
  config = folder.config(hf, path)
  if hf is not None and hf.get("model_type") == "gemma3":
    pictures = [name for name in source.names if _VISION.search(name)]
    source = source.without(pictures)
  source = _without_prefix(source)
  if isinstance(config, AttambaConfig):
    return config, source
  if isinstance(config, MambaConfig) or (
    hf is None and mamba.is_megatron(source)
  ):
    return mamba.open_source(hf, str(path), source)
  if config is None:
    raise InputError(f"{path}: is missing: get the checkpoint again")
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
