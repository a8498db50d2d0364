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


def test_a_chat_is_written_as_smollm2_was_trained():
  tokenizer = made("<|im_start|>", "<|im_end|>")
  text = control_tokens.chat_text(
    tokenizer, [{"role": "user", "content": "Hi"}]
  )
  assert text == (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained "
    "by Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert tokenizer.encode(text).tolist().count(257) == 2
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
  ]
  assert control_tokens.chat_text(tokenizer, messages, begin_answer=False) == (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHo<|im_end|>\n"
  )
  with pytest.raises(InputError, match="--chat"):
    control_tokens.chat_text(made("<|im_start|>"), messages)
