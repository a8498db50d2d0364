"""A model as a folder: `config.json`, `model.safetensors`, `tokenizer.json`.

The folder appears by one rename, so it is whole or absent. A checksum of the
weights stands in the config: damage inside of an array is else not seen.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from models import regression_lm, weight_files
from models import tokenizer as tokenizer_lib
from models.errors import InputError
from models.numbers import TargetCodec
from models.regression_lm import Params
from models.regression_lm_config import RegressionLMConfig
from models.tokenizer import Tokenizer
from research.core import files
from research.regression_lm import described
from research.regression_lm.described import CONFIG, TOKENIZER, WEIGHTS


@dataclasses.dataclass(frozen=True, eq=False)
class Artefact:
  """What is in the folder.

  Attributes:
    config: shape of the model.
    codec: of its targets.
    params: of the model.
    tokenizer: of its texts.
    max_length: tokens that a text is cut to.
    info: what else its maker wrote down, JSON values.
  """

  config: RegressionLMConfig
  codec: TargetCodec
  params: Params
  tokenizer: Tokenizer
  max_length: int
  info: dict[str, Any] = dataclasses.field(default_factory=dict)


def save(directory: str | os.PathLike[str], artefact: Artefact) -> None:
  """Writes a folder that must not exist yet, or be empty.

  Raises:
    InputError: it exists and holds something.
  """
  directory = pathlib.Path(directory)
  if directory.exists() and (
    not directory.is_dir() or any(directory.iterdir())
  ):
    raise InputError(
      f"{directory}: exists and is not overwritten: give another directory"
    )
  with files.whole_folder(directory) as draft:
    weight_files.write(draft / WEIGHTS, artefact.params)
    artefact.tokenizer.backend.save(str(draft / TOKENIZER))
    entries = {
      "kind": described.KIND,
      "version": described.VERSION,
      "model": dataclasses.asdict(artefact.config),
      "numbers": artefact.codec.format.to_json(),
      "num_objectives": artefact.codec.num_objectives,
      "max_length": artefact.max_length,
      "weights_sha256": files.digest_of_file(draft / WEIGHTS),
      "tokenizer_sha256": files.digest_of_file(draft / TOKENIZER),
      "info": artefact.info,
    }
    text = json.dumps(entries, indent=2) + "\n"
    files.write_text(draft / CONFIG, text)


def load(
  directory: str | os.PathLike[str], param_dtype: str | None = None
) -> Artefact:
  """Reads a folder.

  Args:
    directory: of `save`.
    param_dtype: of the parameters; None for that of the file.

  Raises:
    InputError: a file is missing, damaged or does not fit the others.
  """
  directory = pathlib.Path(directory).expanduser()
  made = described.read(directory)
  config = made.config
  params = weight_files.read(
    directory / WEIGHTS, regression_lm.abstract_params(config), param_dtype
  )
  tokenizer = tokenizer_lib.from_json(directory / TOKENIZER)
  for name, file in (("weights", WEIGHTS), ("tokenizer", TOKENIZER)):
    found = files.digest_of_file(directory / file)
    if found != made.digests[name]:
      raise InputError(
        f"{directory / file}: is not the file that {CONFIG} was written with, "
        "or is damaged: get both again"
      )
  if tokenizer.vocab_size > config.vocab_size:
    raise InputError(
      f"{directory / TOKENIZER}: has {tokenizer.vocab_size} tokens, the model "
      f"{config.vocab_size}: get the tokenizer that belongs to it"
    )
  return Artefact(
    config, made.codec, params, tokenizer, made.max_length, made.info
  )
