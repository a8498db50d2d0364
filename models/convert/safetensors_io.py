"""Safetensors files, in and out."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from models import files, input_files
from models.convert import forms
from models.convert.folder import CONFIG, INDEX, PACKED, SINGLE
from models.convert.quantized import NODES, Quantized, to_arrays
from models.errors import InputError
from models.language_model import Config, Params


class SafetensorsFile:
  """One open file, as `models.convert.shards` asks for."""

  def __init__(self, path: pathlib.Path):
    """Reads the header.

    Raises:
      InputError: the file is missing or damaged.
    """
    self._path, self._handle = path, _open(path)
    self._quantized = Quantized(
      self._handle.metadata(), list(self._handle.keys()), str(path)
    )

  def names(self) -> list[str]:
    """Names of its tensors."""
    return self._quantized.names()

  def read(self, name: str) -> np.ndarray | NODES:
    """Reads one.

    Raises:
      InputError: it is of a type that NumPy has not, or its parts do not fit
        each other.
    """
    if name in self._quantized:
      return self._quantized.read(name, self._handle.get_tensor)
    try:
      return self._handle.get_tensor(name)
    except (AttributeError, TypeError, safetensors.SafetensorError) as error:
      kind = self._handle.get_slice(name).get_dtype()
      raise InputError(
        f"{self._path}: tensor {name!r} is of type {kind}, which is not read "
        "here: get a version of the model in bfloat16 or float32"
      ) from error

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one, without reading it."""
    stored = lambda name: tuple(self._handle.get_slice(name).get_shape())
    if name in self._quantized:
      return self._quantized.shape(name, stored)
    return stored(name)


def _open(path: pathlib.Path) -> safetensors.safe_open:
  input_files.regular(path)
  with input_files.errors_at(path, wrong="cannot be read"):
    try:
      return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
      raise InputError(
        f"{path}: {_damage(path)}: get the file again"
      ) from error


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
    except (
      ValueError, LookupError, TypeError, AttributeError, RecursionError,
    ):  # fmt: skip
      return "has a damaged header"
  ends = {name: end for name, end in ends.items() if isinstance(end, int)}
  for name, end in sorted(ends.items(), key=lambda item: item[1]):
    if 8 + length + end > size:
      return (
        f"tensor {name!r} lies beyond the end of the file, which was cut short"
      )
  return "has a damaged header"


def save_safetensors(
  directory: str | os.PathLike[str],
  config: Config,
  params: Params,
  more: Mapping[str, Any] | None = None,
) -> None:
  """Writes `config.json` and `model.safetensors` with Hugging Face names.

  Every array keeps its dtype and every QTensor its format, so that reading it
  back gives the same bits. Rows that pad the vocabulary are left out: they are
  no tokens, and other programs would give them probability.

  Args:
    directory: made if needed; must hold no checkpoint yet.
    config: of the model.
    params: nested dict as `init` of the model returns it.
    more: further entries of `config.json`.

  Raises:
    InputError: the directory already holds a checkpoint, or no Hugging Face
      family fits the config.
  """
  directory = pathlib.Path(directory)
  for name in (CONFIG, SINGLE, INDEX):
    if (directory / name).exists():
      raise InputError(
        f"{directory / name}: exists and is not overwritten: give another "
        "directory"
      )
  config, params = _without_padding(config, params)
  dtype = params["embed"]["table"].dtype.name
  arrays, header = to_arrays(forms.disassemble(config, params))
  hf = forms.to_hf(config, dtype) | (more or {})
  hf |= {"quantization_config": dict(PACKED)} if header else {}
  header = {"format": "pt"} | header
  files.write_safetensors(directory / SINGLE, arrays, header)
  files.write_json(directory / CONFIG, hf)


def _without_padding(config, params):
  """The same model with as many rows in its tables as there are tokens."""
  size = config.vocab_size
  params = params | {"embed": {"table": params["embed"]["table"][:size]}}
  if "lm_head" in params:
    params["lm_head"] = {"kernel": params["lm_head"]["kernel"][:, :size]}
  return dataclasses.replace(config, vocab_multiple=1), params
