"""Flags that read an Attamba with other chunks than it was trained with.

A script that takes them says `flags.adopt_module_key_flags(chunk_flags)`, so
that its `--help` lists them.
"""

import dataclasses
from typing import Any

from absl import flags

import cli
from models.errors import InputError

_SIZE = cli.integer(
  "chunk_size", None, "tokens of an Attamba's chunks instead of its own", 1
)
_WINDOW = cli.integer(
  "chunk_window",
  None,
  "tokens that it sees one by one besides the current one, instead of its own",
  0,
)
FLAGS = (_SIZE, _WINDOW)
# --help lists them where a script adopts them.
flags.disclaim_key_flags()


def told() -> dict[str, Any]:
  """What rows of results say of it; nothing where nothing is changed."""
  return {flag.name: flag.value for flag in FLAGS if flag.value is not None}


def changed(checkpoint: Any) -> Any:
  """A `models.convert.Checkpoint` as the flags say.

  Raises:
    InputError: it is no Attamba, or the sizes do not do.
  """
  if not told():
    return checkpoint
  from models import attamba
  from models.attamba_config import AttambaConfig

  if not isinstance(checkpoint.config, AttambaConfig):
    raise InputError(
      f"--{next(iter(told()))} is for an Attamba, and --model is a "
      f"{checkpoint.config.family}: leave it out"
    )
  config, params = attamba.with_chunks(
    checkpoint.config,
    checkpoint.params,
    chunk_size=_SIZE.value,
    window=_WINDOW.value,
  )
  return dataclasses.replace(checkpoint, config=config, params=params)
