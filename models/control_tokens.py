"""Tokens that stand for no text: where a text ends, and turns of a chat."""

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
# The system turn that SmolLM2's published template begins with.
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Ids after which there is no more text, the end of a document first."""
  found = map(tokenizer.backend.token_to_id, _ENDS)
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
  """Writes a chat in ChatML as SmolLM2-Instruct was trained on it.

  Args:
    tokenizer: must know the tokens of ChatML.
    messages: each with "role" (system, user, assistant) and "content"; the
      model's own system turn comes first where they bring none.
    begin_answer: end with the beginning of the assistant's turn.

  Raises:
    InputError: the tokenizer does not know ChatML.
  """
  for token in (_TURN, _TURN_END):
    if tokenizer.backend.token_to_id(token) is None:
      raise InputError(
        f"the model's tokenizer has no {token}: it was not made for chats of "
        "this form, give the prompt without --chat"
      )
  messages = list(messages)
  if not messages or messages[0]["role"] != "system":
    messages.insert(0, {"role": "system", "content": _SYSTEM})
  turns = [
    f"{_TURN}{message['role']}\n{message['content']}{_TURN_END}\n"
    for message in messages
  ]
  return "".join(turns) + f"{_TURN}assistant\n" * begin_answer
