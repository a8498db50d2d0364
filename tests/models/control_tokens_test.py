import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import models as bpe_models
from tokenizers import pre_tokenizers

from models import control_tokens
from models.convert import load
from models.errors import InputError
from models.tokenizer import Tokenizer, load_tokenizer


def made(*special, bos_id=None):
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate(alphabet)}
  backend = tokenizers.Tokenizer(bpe_models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(list(special))
  return Tokenizer(
    backend=backend, vocab_size=backend.get_vocab_size(), bos_id=bos_id
  )


def test_ends_are_those_that_the_tokenizer_has():
  assert control_tokens.end_ids(made()) == ()
  tokenizer = made("<|im_start|>", "<|im_end|>", "<|endoftext|>")
  assert control_tokens.end_ids(tokenizer) == (258, 257)
  tiny = load_tokenizer(load("tiny"))
  assert control_tokens.end_ids(tiny) == (2, 1)


def test_a_text_starts_behind_a_begin_or_an_end_token():
  assert control_tokens.start_id(made("<s>", bos_id=256)) == 256
  assert control_tokens.start_id(made("<|endoftext|>")) == 256
  with pytest.raises(InputError, match="not empty"):
    control_tokens.start_id(made())


def test_a_text_is_begun_once():
  tokenizer = made("<s>", bos_id=256)
  for text in ("ab", "<s>ab"):
    tokens = control_tokens.begun(tokenizer, tokenizer.encode(text))
    assert tokens[0] == 256 and tokens.tolist().count(256) == 1
  assert len(control_tokens.begun(made(), np.zeros(0, np.int32))) == 0


def test_the_harness_conditions_on_the_named_begin_or_end_token():
  tokenizer = made("<|endoftext|>", "<b>", "<e>")
  assert control_tokens.prefix_id(tokenizer) == 256
  for names, expected in (
    ({"eos_token": "<e>"}, 258),
    ({"bos_token": "<b>", "eos_token": "<e>"}, 257),
    ({"bos_token": "none"}, 256),
  ):
    named = dataclasses.replace(tokenizer, names=names)
    assert control_tokens.prefix_id(named) == expected
