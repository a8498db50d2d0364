"""Models with their tokenizers, as other programs open them."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from models import control_tokens, files
from models.convert import save_safetensors
from models.encoding import Tokenizer
from models.language_model import Config, Params


def save(
  directory: str | os.PathLike[str],
  config: Config,
  params: Params,
  tokenizer: Tokenizer,
  more: Mapping[str, Any] | None = None,
) -> None:
  """Writes a folder that transformers, lm-eval and this project read alike.

  The token that stood between the texts in training begins and ends a text.
  Every file that names special tokens does it by that one: without, a program
  takes the default ids of the architecture, which are other tokens or none. A
  model with a template of chats keeps it, and the names that it may write; all
  tokens that end a text of it are listed.

  Args:
    directory: made if needed; must hold no checkpoint yet.
    config: of the model.
    params: of the model.
    tokenizer: of the model.
    more: further entries of `config.json`.

  Raises:
    InputError: the directory holds a checkpoint, no family of Hugging Face fits
      the config, or the tokenizer has neither a begin nor an end token.
  """
  directory = pathlib.Path(directory)
  boundary = control_tokens.start_id(tokenizer)
  ends = [boundary]
  if tokenizer.chat_template is not None:
    ends = list(dict.fromkeys([boundary, *control_tokens.end_ids(tokenizer)]))
  ids = {
    "bos_token_id": boundary,
    "eos_token_id": boundary if len(ends) == 1 else ends,
  }
  token = tokenizer.backend.id_to_token(boundary)
  described = {
    # The class is named, since transformers would else take Llama's for the
    # architecture, which adds tokens beyond the table.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": token,
    "eos_token": token,
    "clean_up_tokenization_spaces": False,
  }
  if tokenizer.chat_template is not None:
    known = lambda name: tokenizer.backend.token_to_id(name) is not None
    described |= {p: x for p, x in tokenizer.names.items() if known(x)}
    described["chat_template"] = tokenizer.chat_template
  if config.max_position is not None:
    described["model_max_length"] = config.max_position
  save_safetensors(directory, config, params, ids | dict(more or {}))
  with files.whole(directory / "tokenizer.json") as draft:
    tokenizer.backend.save(str(draft))
  files.write_json(directory / "tokenizer_config.json", described)
  files.write_json(
    directory / "generation_config.json", ids | {"pad_token_id": boundary}
  )
