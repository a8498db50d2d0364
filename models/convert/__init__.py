"""Checkpoints in and out: safetensors and PyTorch's .bin, GGUF, llama2.c."""

import importlib
from typing import Any

__all__ = ["Checkpoint", "load", "save_safetensors"]

_HOMES = {
  "Checkpoint": "models.convert.loading",
  "load": "models.convert.loading",
  "save_safetensors": "models.convert.safetensors_io",
}


def __getattr__(name: str) -> Any:
  # Names are imported at their first use: scripts check a model by `folder`
  # before they need JAX.
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)
