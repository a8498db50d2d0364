"""Prompts from a file."""

import pathlib

from models.errors import InputError
from models.text import load_text


def read(name: str) -> list[str]:
  """The prompts of a file.

  Args:
    name: of a text file that is one prompt, or of a .jsonl file with a
      {"prompt": ...} a line.

  Raises:
    InputError: it is missing, or a line has no prompt.
  """
  if not name.endswith(".jsonl"):
    return [load_text(name)]
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise InputError(f"--prompt_file={path}: there is no such file")
  # Most prompts need no such file, and the module takes JAX.
  from research.core import metrics

  prompts = []
  for number, row in enumerate(metrics.read_jsonl(path), 1):
    if not isinstance(row.get("prompt"), str):
      raise InputError(f'{path} line {number} has no text under "prompt"')
    prompts.append(row["prompt"])
  return prompts
