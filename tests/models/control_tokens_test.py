import dataclasses
import sys

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


# As published with SmolLM2.
SMOLLM2 = """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained \
by Hugging Face<|im_end|>\n' }}
{% endif %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
'<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""".replace("\n{", "{").replace("}\n", "}")
MESSAGES = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Ho"},
]


def test_a_chat_is_written_as_smollm2_was_trained():
  tokenizer = dataclasses.replace(
    made("<|im_start|>", "<|im_end|>"), chat_template=SMOLLM2
  )
  text = control_tokens.chat_text(
    tokenizer, [{"role": "user", "content": "Hi"}]
  )
  assert text == (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained "
    "by Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert tokenizer.encode(text).tolist().count(257) == 2


@pytest.mark.parametrize(
  "template, text",
  [
    ("{{ bos_token }}{{ messages[1].content }}!", "<s>Hi!"),
    ("{% if tools %}x{% endif %}{{ messages | length | tojson }}", "3"),
    ("{% for m in messages %}{% break %}{% endfor %}{{ no }}", ""),
  ],
)
def test_a_chat_has_the_form_of_the_models_own_template(template, text):
  tokenizer = dataclasses.replace(
    made(), chat_template=template, names={"bos_token": "<s>"}
  )
  assert control_tokens.chat_text(tokenizer, MESSAGES) == text


@pytest.mark.parametrize(
  "template",
  [
    "{{ raise_exception('no system turn') }}",
    "{% for %}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  ],
)
def test_a_template_that_fails_is_one_line(template):
  tokenizer = dataclasses.replace(made(), chat_template=template)
  with pytest.raises(InputError, match="template fails .*--chat"):
    control_tokens.chat_text(tokenizer, MESSAGES)


def test_a_template_without_jinja2_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "jinja2", None)
  tokenizer = dataclasses.replace(made(), chat_template="x")
  with pytest.raises(InputError, match="pip install jinja2"):
    control_tokens.chat_text(tokenizer, MESSAGES)


def test_without_a_template_a_chat_is_chatml():
  tokenizer = made("<|im_start|>", "<|im_end|>")
  turns = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHo<|im_end|>\n"
  )
  for begin, end in ((False, ""), (True, "<|im_start|>assistant\n")):
    text = control_tokens.chat_text(tokenizer, MESSAGES, begin_answer=begin)
    assert text == turns + end
  with pytest.raises(InputError, match="--chat"):
    control_tokens.chat_text(made("<|im_start|>"), MESSAGES)
