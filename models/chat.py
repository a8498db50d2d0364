"""Chats as text, by the template that a model brings along.

Templates are programs in Jinja's language. One runs in a process of its own
(`chat_child.py`), so that none takes more than some seconds and some memory.
"""

import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from models import control_tokens
from models.encoding import Tokenizer
from models.errors import InputError

Messages = Sequence[Mapping[str, str]]

_TURN, _TURN_END = "<|im_start|>", "<|im_end|>"
_CHILD = pathlib.Path(__file__).with_name("chat_child.py")
# Of the processor, and of the clock on a machine that is busy.
_SECONDS, _PATIENCE = 5, 60
_MEMORY = 256 << 20
# One process writes so many.
_CHATS = 1000
# A template may write so many times what it was given, and so much more.
_RATIO, _ROOM = 16, 1 << 18


def write(
  tokenizer: Tokenizer, chats: Sequence[Messages], *, begin_answer: bool = True
) -> list[str]:
  """Writes chats by the model's own template, or in ChatML without one.

  Args:
    tokenizer: of the model.
    chats: messages, each with "role" (system, user, assistant) and "content".
    begin_answer: end with the beginning of the assistant's turn.

  Raises:
    InputError: the template fails or cannot be run; or there is none, and the
      tokenizer does not know ChatML.
  """
  if tokenizer.chat_template is not None:
    return _rendered(tokenizer, chats, begin_answer)
  for token in (_TURN, _TURN_END):
    if tokenizer.backend.token_to_id(token) is None:
      raise InputError(
        f"the model has no chat template, and its tokenizer has no {token}: it "
        "was not made for chats, give the prompt without --chat"
      )
  end = f"{_TURN}assistant\n" * begin_answer
  turns = (
    [
      f"{_TURN}{message['role']}\n{message['content']}{_TURN_END}\n"
      for message in messages
    ]
    for messages in chats
  )
  return ["".join(written) + end for written in turns]


def encode(tokenizer: Tokenizer, chats: Sequence[Messages]) -> list[np.ndarray]:
  """The tokens (T,) of each chat, up to the beginning of the answer.

  A template writes the begin token where the model wants one; none is added.

  Raises:
    InputError: as `write`.
  """
  found = [tokenizer.encode(text) for text in write(tokenizer, chats)]
  if tokenizer.chat_template is None:
    found = [control_tokens.begun(tokenizer, tokens) for tokens in found]
  if not all(map(len, found)):
    raise InputError(
      "the model's chat template writes nothing: write the chat into the "
      "prompt, without --chat"
    )
  return found


def _rendered(
  tokenizer: Tokenizer, chats: Sequence[Messages], begin_answer: bool
) -> list[str]:
  if importlib.util.find_spec("jinja2") is None:
    raise InputError(
      "chats need the package jinja2: run `make venv` or `pip install jinja2`"
    )
  texts = []
  for first in range(0, len(chats), _CHATS):
    texts += _some(tokenizer, chats[first : first + _CHATS], begin_answer)
  return texts


def _some(
  tokenizer: Tokenizer, chats: Sequence[Messages], begin_answer: bool
) -> list[str]:
  """As many chats as one process is given."""
  chats = [list(map(dict, messages)) for messages in chats]
  given = len(tokenizer.chat_template) + max(map(_length, chats), default=0)
  request = {
    "template": tokenizer.chat_template,
    "chats": chats,
    "names": dict(tokenizer.names),
    "begin_answer": begin_answer,
    "seconds": _SECONDS,
    "memory": _MEMORY,
    "characters": _RATIO * given + _ROOM,
  }
  try:
    answer = _answer(json.dumps(request))
    texts = answer.get("texts")
    if texts is None:
      raise ValueError(answer["error"])
    if len(texts) != len(chats) or not all(isinstance(x, str) for x in texts):
      raise ValueError("it answers for the program that runs it")
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    why = " ".join(str(error)[:200].split())
    raise InputError(
      f"the model's chat template fails ({why}): write the chat into the "
      "prompt, without --chat"
    ) from error
  return texts


def _length(messages: Messages) -> int:
  return len(json.dumps(messages))


def _answer(request: str) -> dict:
  """What the child says; raises ValueError where it does not come to it."""
  # The folder of the child holds modules with names of Python's own, among
  # which -P does not look.
  command = [sys.executable, "-P", str(_CHILD)]
  try:
    done = subprocess.run(
      command, input=request, capture_output=True, text=True, timeout=_PATIENCE
    )
  except subprocess.TimeoutExpired as error:
    raise ValueError(f"it takes longer than {_PATIENCE} s") from error
  if done.returncode == -signal.SIGXCPU:
    raise ValueError(f"it takes longer than {_SECONDS} s")
  if done.returncode:
    last = done.stderr.strip().rpartition("\n")[2][:100]
    raise ValueError(f"its process ended with {done.returncode}, {last}")
  return json.loads(done.stdout)
