"""A quantized model as a folder that every script takes as a model."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from models import export, language_model
from models.module import Params
from models.tokenizer import Tokenizer
from ops.quantized import QTensor, QWeight
from research.core import files
from research.cost.recurrent_step import nbytes

# The entry of config.json that says how the model came to be.
KEY = "frugax_recipe"
# The bytes of a number that is in no format, since models keep bfloat16.
_FLOAT_BYTES = 2


def save(
  directory: str | os.PathLike[str],
  config: language_model.Config,
  params: Params,
  tokenizer: Tokenizer,
  described: Mapping[str, Any],
) -> None:
  """Writes config.json, model.safetensors and the tokenizer's files.

  Args:
    directory: must not exist.
    config: of the model.
    params: of the model.
    tokenizer: of the model.
    described: how it came to be, as JSON values.

  Raises:
    FileExistsError: the folder is there.
  """
  with files.whole_folder(pathlib.Path(directory)) as draft:
    export.save(draft, config, params, tokenizer, {KEY: dict(described)})


def num_bytes(config: language_model.Config, params: Params) -> int:
  """Bytes of all weights: of few bits as they are kept, of others 16 bits.

  Scales count, and the padding of a token table does not.
  """
  rows = config.vocab_size
  params = params | {"embed": {"table": params["embed"]["table"][:rows]}}
  if "lm_head" in params:
    kernel = params["lm_head"]["kernel"][:, :rows]
    params = params | {"lm_head": {"kernel": kernel}}
  return _bytes(params)


def _bytes(tree: Any) -> int:
  is_node = lambda leaf: isinstance(leaf, QTensor | QWeight)
  total = 0
  for leaf in jax.tree.leaves(tree, is_leaf=is_node):
    if isinstance(leaf, QTensor):
      total += nbytes(leaf)
    elif isinstance(leaf, QWeight):
      total += _bytes(leaf.weight) + nbytes(leaf.input)
    else:
      total += _FLOAT_BYTES * leaf.size
  return total
