"""What the folder of a regression language model says of it, without JAX.

Scripts check a model and the rows for it before they import what takes seconds;
`artefact` reads and writes the rest of the folder.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from models import input_files, numbers
from models.errors import InputError, shown
from models.numbers import TargetCodec
from models.regression_lm_config import RegressionLMConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
KIND = "frugax-regression-lm"
VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Described:
  """What `config.json` says.

  Attributes:
    config: shape of the model.
    codec: of its targets.
    max_length: tokens that a text is cut to.
    info: what else its maker wrote down, JSON values.
    digests: SHA-256 of the files "weights" and "tokenizer", None where the file
      does not say.
  """

  config: RegressionLMConfig
  codec: TargetCodec
  max_length: int
  info: dict[str, Any]
  digests: Mapping[str, Any]

  @property
  def num_objectives(self) -> int:
    """O, numbers of a row."""
    return self.codec.num_objectives


def read(directory: str | os.PathLike[str]) -> Described:
  """Reads the config of a folder whose other files are there.

  Raises:
    InputError: a file is missing, or the config is damaged.
  """
  directory = pathlib.Path(directory).expanduser()
  path = directory / CONFIG
  entries = _read_json(path)
  with input_files.errors_at(path, wrong="does not describe a model"):
    config = RegressionLMConfig.from_json(entries["model"])
    codec = TargetCodec(
      format=numbers.from_json(entries["numbers"]),
      num_objectives=entries["num_objectives"],
    )
    max_length, info = int(entries["max_length"]), dict(entries["info"])
    digests = {n: entries.get(f"{n}_sha256") for n in ("weights", "tokenizer")}
  expected = (len(codec.tokens), codec.length)
  if expected != (config.target_vocab_size, config.target_length):
    raise InputError(
      f"{path}: its numbers have {expected[0]} tokens in rows of "
      f"{expected[1]}, its model {config.target_vocab_size} in rows of "
      f"{config.target_length}: get the file again"
    )
  for name in (WEIGHTS, TOKENIZER):
    input_files.regular(directory / name)
  return Described(config, codec, max_length, info, digests)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    raise InputError(
      f"{path}: is missing: give the folder that a model was saved to"
    )
  entries = input_files.parse_json(input_files.read_text(path), path, object)
  if not isinstance(entries, dict) or entries.get("kind") != KIND:
    raise InputError(f"{path}: is not of a regression language model")
  if entries.get("version") != VERSION:
    raise InputError(
      f"{path}: has version {shown(entries.get('version'))}, this code reads "
      f"{VERSION}"
    )
  return entries
