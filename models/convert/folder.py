"""What the folder of a checkpoint says of itself, read without JAX.

Scripts check a model by it before they import what takes seconds.
"""

import pathlib
import types
from typing import Any

from models import input_files
from models.attamba_config import AttambaConfig
from models.convert import attamba_config, hf_config, mamba_config
from models.errors import InputError
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
# The `quantization_config` of weights in a form of this project; without it
# other programs would take them for missing.
PACKED = types.MappingProxyType({"quant_method": "frugax"})


def check(path: pathlib.Path) -> None:
  """Raises InputError where a folder's weights or config cannot be a model's.

  Args:
    path: of the folder.
  """
  hf = read_config(path / CONFIG)
  weights(path)
  config(hf, path / CONFIG)


def read_config(path: pathlib.Path) -> dict[str, Any] | None:
  """A `config.json`, or None where there is none.

  Raises:
    InputError: it is no JSON object.
  """
  if not path.exists():
    return None
  return input_files.read_json(path, advice="get the checkpoint again")


def weights(directory: pathlib.Path) -> pathlib.Path:
  """The file of weights, or the index of several; safetensors come first.

  Raises:
    InputError: there is none.
  """
  for name in (SINGLE, INDEX, BIN, f"{BIN}.index.json"):
    if (directory / name).exists():
      return directory / name
  raise InputError(
    f"{directory}: has neither {SINGLE} nor {INDEX}, nor {BIN}: give a "
    "directory with safetensors and config.json"
  )


def config(
  hf: dict[str, Any] | None, path: pathlib.Path
) -> TransformerConfig | MambaConfig | AttambaConfig | None:
  """The model that a config describes; None where there is no config.

  Args:
    hf: the parsed `config.json`.
    path: of that file, for messages.

  Raises:
    InputError: an unsupported option, a missing key, or sizes that do not fit.
  """
  if hf is None:
    return None
  packed = hf.get("quantization_config")
  if packed and packed != PACKED:
    raise InputError(
      f"{path}: quantization_config says that the weights are packed, in a "
      "form that is not read here: get the model before it was quantized, or "
      "a .gguf file of it"
    )
  for form in (attamba_config, mamba_config):
    if form.describes(hf):
      return form.from_json(hf, str(path))
  return hf_config.from_hf(hf, str(path))
