"""Checkpoints of the Hugging Face hub."""

import pathlib

import huggingface_hub

from models.errors import InputError

# A tokenizer, and what else says where a text ends and how chats are written.
_TOKENIZER_PATTERNS = (
  "config.json",
  "tokenizer.json",
  "tokenizer.model",
  "added_tokens.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.*",
)
_PATTERNS = (
  *_TOKENIZER_PATTERNS,
  "*.safetensors",
  "model.safetensors.index.json",
)
# Only where there are no safetensors: most repositories hold both.
_BIN_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


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


def download_tokenizer(hub_id: str) -> pathlib.Path:
  """Fetches the tokenizer of "org/name"; returns the directory.

  Raises:
    InputError: the hub cannot be reached or does not have it.
  """
  try:
    return _snapshot(hub_id, _TOKENIZER_PATTERNS)
  except Exception as error:  # Errors of several libraries, with one remedy.
    raise InputError(
      f"--tokenizer={hub_id}: cannot be had from the Hugging Face hub "
      f"({type(error).__name__}): check the name and the network, or give the "
      "path of a tokenizer.json"
    ) from error


def _snapshot(hub_id: str, patterns: tuple[str, ...]) -> pathlib.Path:
  return pathlib.Path(
    huggingface_hub.snapshot_download(
      hub_id, allow_patterns=list(patterns), etag_timeout=10
    )
  )
