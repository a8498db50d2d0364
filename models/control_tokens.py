"""Tokens that stand for no text: where a text begins, and where it ends."""

import numpy as np

from models.encoding import Tokenizer
from models.errors import InputError

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
  "<|eom_id|>",
  "<end_of_turn>",
  # As llama2.c's tokenizer files spell them.
  "\n</s>\n",
  "\n<s>\n",
)


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
