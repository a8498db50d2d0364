"""A model as a folder: `config.json`, `model.safetensors`, `tokenizer.json`.

The folder appears by one rename, so it is whole or absent. A checksum of the
weights stands in the config: damage inside of an array is else not seen.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from models import input_files, numbers, regression_lm, weight_files
from models import tokenizer as tokenizer_lib
from models.errors import InputError, shown
from models.numbers import TargetCodec
from models.regression_lm import Params
from models.regression_lm_config import RegressionLMConfig
from models.tokenizer import Tokenizer
from research.core import files

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
_KIND = "frugax-regression-lm"
_VERSION = 1


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
    described = {
      "kind": _KIND,
      "version": _VERSION,
      "model": dataclasses.asdict(artefact.config),
      "numbers": artefact.codec.format.to_json(),
      "num_objectives": artefact.codec.num_objectives,
      "max_length": artefact.max_length,
      "weights_sha256": files.digest_of_file(draft / WEIGHTS),
      "tokenizer_sha256": files.digest_of_file(draft / TOKENIZER),
      "info": artefact.info,
    }
    text = json.dumps(described, indent=2) + "\n"
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
  path = directory / CONFIG
  described = _read_config(path)
  with input_files.errors_at(path, wrong="does not describe a model"):
    config = RegressionLMConfig.from_json(described["model"])
    codec = TargetCodec(
      format=numbers.from_json(described["numbers"]),
      num_objectives=described["num_objectives"],
    )
    max_length, info = int(described["max_length"]), dict(described["info"])
  expected = (len(codec.tokens), codec.length)
  if expected != (config.target_vocab_size, config.target_length):
    raise InputError(
      f"{path}: its numbers have {expected[0]} tokens in rows of "
      f"{expected[1]}, its model {config.target_vocab_size} in rows of "
      f"{config.target_length}: get the file again"
    )
  params = weight_files.read(
    directory / WEIGHTS, regression_lm.abstract_params(config), param_dtype
  )
  tokenizer = tokenizer_lib.from_json(directory / TOKENIZER)
  for name, file in (("weights", WEIGHTS), ("tokenizer", TOKENIZER)):
    found = files.digest_of_file(directory / file)
    if found != described.get(f"{name}_sha256"):
      raise InputError(
        f"{directory / file}: is not the file that {CONFIG} was written with, "
        "or is damaged: get both again"
      )
  if tokenizer.vocab_size > config.vocab_size:
    raise InputError(
      f"{directory / TOKENIZER}: has {tokenizer.vocab_size} tokens, the model "
      f"{config.vocab_size}: get the tokenizer that belongs to it"
    )
  return Artefact(config, codec, params, tokenizer, max_length, info)


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    raise InputError(
      f"{path}: is missing: give the folder that a model was saved to"
    )
  described = input_files.parse_json(input_files.read_text(path), path, object)
  if not isinstance(described, dict) or described.get("kind") != _KIND:
    raise InputError(f"{path}: is not of a regression language model")
  if described.get("version") != _VERSION:
    raise InputError(
      f"{path}: has version {shown(described.get('version'))}, this code reads "
      f"{_VERSION}"
    )
  return described
