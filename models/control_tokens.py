"""Tokens that stand for no text: where a text ends, and turns of a chat."""

import datetime
import json
from collections.abc import Mapping, Sequence

import numpy as np

from models.errors import InputError
from models.tokenizer import Tokenizer

# Where texts were packed one after the other a begin token ends one too.
_ENDS = (
  "<|endoftext|>",
  "<|end_of_text|>",
  "<|begin_of_text|>",
  "</s>",
  "<s>",
  "<eos>",
  "<bos>",
  "<|im_end|>",
  "<|eot_id|>",
  # As llama2.c's tokenizer files spell them.
  "\n</s>\n",
  "\n<s>\n",
)
_TURN, _TURN_END = "<|im_start|>", "<|im_end|>"


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Ids after which there is no more text, the end of a document first.

  Those of the usual names, and those that the model's own files name.
  """
  found = [*map(tokenizer.backend.token_to_id, _ENDS), *tokenizer.end_ids]
  return tuple(dict.fromkeys(i for i in found if i is not None))


def start_id(tokenizer: Tokenizer) -> int:
  """The id to condition the first token of a text on.

  The begin token, or the end token of the text before.

  Raises:
    InputError: the tokenizer has neither.
  """
  if tokenizer.bos_id is not None:
    return tokenizer.bos_id
  ends = end_ids(tokenizer)
  if not ends:
    raise InputError(
      "the tokenizer has neither a begin nor an end token: give a prompt that "
      "is not empty"
    )
  return ends[0]


def prefix_id(tokenizer: Tokenizer) -> int:
  """The id that lm-evaluation-harness conditions the first token of a text on.

  The begin token that the model's files name, or else the end token.

  Raises:
    InputError: the tokenizer has neither.
  """
  for part in ("bos_token", "eos_token"):
    found = tokenizer.backend.token_to_id(tokenizer.names.get(part, ""))
    if found is not None:
      return found
  return start_id(tokenizer)


def begun(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
  """Tokens (T,) of a text behind the begin token, which texts may bring along.

  They stay as they are where the model was trained without one.
  """
  begin = tokenizer.bos_id
  if begin is None or (len(tokens) and tokens[0] == begin):
    return tokens
  return np.concatenate([np.asarray([begin], np.int32), tokens])


def chat_text(
  tokenizer: Tokenizer,
  messages: Sequence[Mapping[str, str]],
  *,
  begin_answer: bool = True,
) -> str:
  """Writes a chat by the model's own template, or in ChatML without one.

  Args:
    tokenizer: of the model.
    messages: each with "role" (system, user, assistant) and "content".
    begin_answer: end with the beginning of the assistant's turn.

  Raises:
    InputError: the template fails or cannot be run; or there is none, and the
      tokenizer does not know ChatML.
  """
  if tokenizer.chat_template is not None:
    return _rendered(tokenizer, messages, begin_answer)
  for token in (_TURN, _TURN_END):
    if tokenizer.backend.token_to_id(token) is None:
      raise InputError(
        f"the model has no chat template, and its tokenizer has no {token}: it "
        "was not made for chats, give the prompt without --chat"
      )
  turns = [
    f"{_TURN}{message['role']}\n{message['content']}{_TURN_END}\n"
    for message in messages
  ]
  return "".join(turns) + f"{_TURN}assistant\n" * begin_answer


def _rendered(
  tokenizer: Tokenizer,
  messages: Sequence[Mapping[str, str]],
  begin_answer: bool,
) -> str:
  """Runs the template in a sandbox, with what `transformers` offers it."""
  try:
    from jinja2 import exceptions, ext, sandbox
  except ImportError as error:
    raise InputError(
      "chats need the package jinja2: run `make venv` or `pip install jinja2`"
    ) from error

  def fail(message):
    raise exceptions.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
  )
  environment.globals |= {
    "raise_exception": fail,
    "strftime_now": lambda form: datetime.datetime.now().strftime(form),
  }
  environment.filters["tojson"] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  try:
    return environment.from_string(tokenizer.chat_template).render(
      messages=list(messages),
      add_generation_prompt=begin_answer,
      tools=None,
      documents=None,
      **tokenizer.names,
    )
  except Exception as error:  # A template may fail in any way.
    raise InputError(
      f"the model's chat template fails ({str(error)[:200]}): write the chat "
      "into the prompt, without --chat"
    ) from error
