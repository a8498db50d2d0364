"""A quantized model as a folder that every script takes as a model."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from models import export, language_model
from models.module import Params
from models.tokenizer import Tokenizer
from research.core import files

# The entry of config.json that says how the model came to be.
KEY = "frugax_recipe"


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
