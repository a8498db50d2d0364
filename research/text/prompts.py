"""Prompts from a file, and prompts as chats."""

import pathlib
from collections.abc import Sequence
from typing import Any

from models import input_files
from models.errors import InputError
from models.text import load_text

# A text, or the messages of a chat.
Prompt = str | list[dict[str, str]]


def read(name: str, *, chat: bool = False) -> list[Prompt]:
  """The prompts of a file.

  Args:
    name: of a text file that is one prompt, without the line break at its end,
      also packed, or of a .jsonl file with a {"prompt": ...} a line.
    chat: whether a line may hold a chat instead, {"messages": [{"role": ...,
      "content": ...}, ...]}.

  Raises:
    InputError: it is missing, or a line has no prompt.
  """
  path = pathlib.Path(name).expanduser()
  if path.suffix != ".jsonl":
    text = input_files.read_text(path) if path.is_file() else load_text(name)
    # Editors end a file with one, and a model would go on behind it.
    return [text.removesuffix("\n").removesuffix("\r")]
  if not path.is_file():
    raise InputError(f"--prompt_file={path}: there is no such file")
  # Most prompts need no such file, and the module takes JAX.
  from research.core import metrics

  rows = enumerate(metrics.read_jsonl(path), 1)
  return [_prompt(row, f"{path} line {i}", chat) for i, row in rows]


def _prompt(row: dict[str, Any], where: str, chat: bool) -> Prompt:
  messages, prompt = row.get("messages"), row.get("prompt")
  if isinstance(prompt, str):
    return prompt
  if messages is None:
    raise InputError(f'{where} has no text under "prompt"')
  if not chat:
    raise InputError(f'{where} is a chat ("messages"): give --chat')
  valid = isinstance(messages, list) and all(
    isinstance(message, dict)
    and all(isinstance(message.get(key), str) for key in ("role", "content"))
    for message in messages
  )
  if not valid or not messages:
    raise InputError(
      f'{where}: "messages" is no list of {{"role": ..., "content": ...}} with '
      "texts: mend it"
    )
  return messages


def chats(
  prompts: Sequence[Prompt], system: str | None = None
) -> list[list[dict[str, str]]]:
  """The messages of each prompt; a text is a user's turn.

  Args:
    prompts: texts or messages.
    system: the first turn of those that have none of this role.
  """
  found = []
  for prompt in prompts:
    if isinstance(prompt, str):
      prompt = [{"role": "user", "content": prompt}]
    if system is not None and prompt[0]["role"] != "system":
      prompt = [{"role": "system", "content": system}, *prompt]
    found.append(prompt)
  return found


def shown(prompt: Prompt) -> str:
  """A prompt in a word: of a chat its last turn."""
  return prompt if isinstance(prompt, str) else prompt[-1]["content"]
