"""How checkpoints of each family are written: tensors and `config.json`."""

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from models import language_model
from models.attamba_config import AttambaConfig
from models.convert import attamba, hf_config, mamba, names, quantized
from models.errors import InputError
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """The form of one family.

  Attributes:
    label: what a checkpoint should be of, for messages.
    leaves: yields every parameter array that a config calls for.
    to_hf: the `config.json` of a config, given the dtype of the weights.
  """

  label: str
  leaves: Callable[[Any], Iterator[names.Leaf]]
  to_hf: Callable[[Any, str], dict[str, Any]]


FORMS = types.MappingProxyType(
  {
    TransformerConfig: Form(
      label="Llama, Qwen2 or Qwen3",
      leaves=names.leaves,
      to_hf=hf_config.to_hf,
    ),
    MambaConfig: Form(label="Mamba", leaves=mamba.leaves, to_hf=mamba.to_hf),
    AttambaConfig: Form(
      label="Attamba", leaves=attamba.leaves, to_hf=attamba.to_hf
    ),
  }
)


def assemble(
  config: language_model.Config, source: names.TensorSource, dtype: jnp.dtype
) -> language_model.Params:
  """Builds the parameters of `config`.

  Mamba's A_log, D and dt_bias keep a wider dtype of the file.

  Raises:
    InputError: a tensor is missing, unknown or of a wrong shape.
  """
  form = FORMS[type(config)]
  if config.num_layers > len(source.names):
    raise InputError(
      f"{source.label('of a layer')} is missing: the config names "
      f"{config.num_layers} layers, the file has {len(source.names)} tensors: "
      "get it again, or correct the config"
    )
  return names.build(form.leaves(config), source, dtype, form.label)


def disassemble(
  config: language_model.Config, params: language_model.Params
) -> dict[str, np.ndarray | quantized.NODES]:
  """The inverse of `assemble`: contiguous tensors by Hugging Face name."""
  return names.take_apart(FORMS[type(config)].leaves(config), params)


def to_hf(config: language_model.Config, dtype: str) -> dict[str, Any]:
  """The `config.json` of `config`, as transformers 4 and 5 read it.

  Args:
    config: of the model.
    dtype: of the weights, "float32" or "bfloat16".

  Raises:
    InputError: no family of Hugging Face fits the config.
  """
  return FORMS[type(config)].to_hf(config, dtype)
