"""Directories with `config.json` and safetensors, in and out."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from models.convert import hf_config
from models.convert.names import TensorSource, disassemble
from models.errors import InputError
from models.transformer import Params
from models.transformer_config import TransformerConfig

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_ROTATION = "rotary_emb.inv_freq"


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    InputError: the file is missing or is no JSON object.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise InputError(f"{path}: is missing: get the checkpoint again") from error
  except (OSError, ValueError) as error:
    raise InputError(
      f"{path}: is no readable JSON: get the file again"
    ) from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: is no JSON object: get the file again")
  return value


def open_directory(
  directory: pathlib.Path,
) -> tuple[TransformerConfig, TensorSource]:
  """Opens a directory of Hugging Face; reads no tensor yet.

  Raises:
    InputError: a file is missing, cut short or does not fit the others.
  """
  hf = read_json(directory / "config.json")
  files = _files(directory)
  handles = {path: _open(path) for path in sorted(set(files.values()))}
  held = {n: path for path, handle in handles.items() for n in handle.keys()}
  for name, path in files.items():
    if held.get(name) != path:
      raise InputError(
        f"{path}: tensor {name!r} is missing, though the index lists it: get "
        "the file again"
      )
  config_path = directory / "config.json"
  config = hf_config.from_hf(hf, str(config_path), has_head=_HEAD in held)
  if config.tie_embeddings:
    # Some exporters write the tied head a second time; it is never read.
    held.pop(_HEAD, None)
  # Rotation tables that old exporters wrote; they follow from the config.
  for name in [name for name in held if name.endswith(_ROTATION)]:
    del held[name]
  first = next(iter(handles))

  def read(name: str) -> np.ndarray:
    return handles[held[name]].get_tensor(name)

  def label(name: str) -> str:
    return f"{held.get(name, first)}: tensor {name!r}"

  source = TensorSource(names=frozenset(held), read=read, label=label)
  return config, source


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file of every tensor."""
  index = directory / _INDEX
  single = directory / _SINGLE
  if single.exists():
    return {name: single for name in _open(single).keys()}
  if not index.exists():
    raise InputError(
      f"{directory}: has neither {_SINGLE} nor {_INDEX}: give a directory "
      "with safetensors and config.json"
    )
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise InputError(f"{index}: has no weight_map: get the file again")
  return {name: directory / file for name, file in weight_map.items()}


def _open(path: pathlib.Path) -> safetensors.safe_open:
  try:
    return safetensors.safe_open(path, framework="numpy")
  except FileNotFoundError as error:
    raise InputError(
      f"{path}: is missing, though the index lists it: get it again"
    ) from error
  except OSError as error:
    raise InputError(f"{path}: cannot be read: {error}") from error
  except safetensors.SafetensorError as error:
    raise InputError(f"{path}: {_damage(path)}: get the file again") from error


def _damage(path: pathlib.Path) -> str:
  """Says what is wrong with a file that the library refuses."""
  with path.open("rb") as file:
    data = file.read(8)
    length = int.from_bytes(data, "little")
    size = path.stat().st_size
    if len(data) < 8 or 8 + length > size:
      return "is no safetensors file, or was cut short in its header"
    try:
      header = json.loads(file.read(length))
      header.pop("__metadata__", None)
      ends = {name: entry["data_offsets"][1] for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
      return "has a damaged header"
  for name, end in sorted(ends.items(), key=lambda item: item[1]):
    if 8 + length + end > size:
      return (
        f"tensor {name!r} lies beyond the end of the file, which was cut short"
      )
  return "has a damaged header"


def save_safetensors(
  directory: str | os.PathLike[str], config: TransformerConfig, params: Params
) -> None:
  """Writes `config.json` and `model.safetensors` with Hugging Face names.

  Every array keeps its dtype, so that reading it back gives the same bits.

  Args:
    directory: made if needed; must hold no checkpoint yet.
    config: of the model.
    params: nested dict as `models.transformer.init` returns it.

  Raises:
    InputError: the directory already holds a checkpoint, or no Hugging Face
      family fits the config.
  """
  directory = pathlib.Path(directory)
  for name in ("config.json", _SINGLE, _INDEX):
    if (directory / name).exists():
      raise InputError(
        f"{directory / name}: exists and is not overwritten: give another "
        "directory"
      )
  tensors = disassemble(config, params)
  dtype = tensors["model.embed_tokens.weight"].dtype.name
  text = json.dumps(hf_config.to_hf(config, dtype), indent=2) + "\n"
  directory.mkdir(parents=True, exist_ok=True)
  # Renamed when whole, so that a killed export leaves no half checkpoint.
  partial = directory / (_SINGLE + ".partial")
  safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
  partial.rename(directory / _SINGLE)
  (directory / "config.json").write_text(text, encoding="utf-8")
