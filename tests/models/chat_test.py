"""Chats by templates; `transformers` 5.24 gave the texts of forms."""

import dataclasses
import datetime
import sys
import time

import numpy as np
import pytest

from models import chat, chat_child
from models.errors import InputError
from tests.models import control_tokens_test

CHAT = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": " Hi <é>\n"},
  {"role": "assistant", "content": "Ho"},
]
# Written for this test, with what the templates of these models make use of.
LLAMA3 = """\
{{- bos_token }}
{%- if not date is defined %}
    {%- set date = strftime_now("%Y") if strftime_now is defined else "x" %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if loop.first and message['role'] == 'system' %}{{ date + ' ' }}
    {%- endif %}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{%- set ns = namespace(index=0, system='') %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content + '\\n\\n' %}
        {%- continue %}
    {%- endif %}
    {%- if (message.role == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('Roles must alternate.') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + ns.system + message.content.strip() + '[/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
  "{{ raise_exception('System role not supported') }}{% endif %}"
  "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else "
  "m.role %}{{ '<start_of_turn>' + role + '\n' + m.content | trim + "
  "'<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Lines of blocks alone leave nothing behind; the last line end goes as well.
BLOCKS = """\
{% for m in messages %}
    {% if loop.index == 3 %}
        {% break %}
    {% endif %}
  {{ m.content | tojson }}
{% endfor %}
{% generation %}
{{ tools }} {{ documents }} {{ messages[2] | tojson(indent=1) }}
{% endgeneration %}
{{ missing }}{{ [1, {'b': '<'}] | tojson(separators=(',', ':')) }}
"""


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


def render(template, messages=CHAT, begin_answer=True):
  request = {
    "template": template,
    "chats": [messages],
    "names": {"bos_token": "<s>", "eos_token": "</s>"},
    "begin_answer": begin_answer,
    "characters": 10000,
  }
  return chat_child.render(request)[0]


def test_headers_and_dates():
  begin, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
  text = (
    f"<s>{begin}system{end}{datetime.datetime.now():%Y} Be brief.<|eot_id|>"
    f"{begin}user{end}Hi <é><|eot_id|>{begin}assistant{end}Ho<|eot_id|>"
  )
  assert render(LLAMA3, begin_answer=False) == text
  assert render(LLAMA3) == text + f"{begin}assistant{end}"


def test_turns_that_a_namespace_counts():
  text = "<s>[INST] Be brief.\n\nHi <é>[/INST] Ho</s>"
  assert render(MISTRAL) == text
  with pytest.raises(Exception, match="Roles must alternate"):
    render(MISTRAL, CHAT + CHAT[2:])


def test_roles_that_are_not_supported():
  turn = "<start_of_turn>user\nHi <é><end_of_turn>\n<start_of_turn>model\n"
  assert render(GEMMA, CHAT[1:2]) == f"<s>{turn}"
  with pytest.raises(Exception, match="System role not supported"):
    render(GEMMA)


def test_a_system_turn_that_the_template_has_itself():
  assert render(SMOLLM2, CHAT[1:2]) == (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained "
    "by Hugging Face<|im_end|>\n<|im_start|>user\n Hi <é>\n<|im_end|>\n"
    "<|im_start|>assistant\n"
  )


def test_lines_of_blocks_and_json():
  assert render(BLOCKS) == (
    '  "Be brief."\n  " Hi <é>\\n"\nNone None {\n "role": "assistant",\n '
    '"content": "Ho"\n}\n[1,{"b":"<"}]'
  )


@pytest.mark.parametrize(
  "template",
  [
    "{{ messages.append(1) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['sys'] }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ range(10**9) | length }}",
  ],
)
def test_nothing_leads_out_of_the_sandbox(template):
  with pytest.raises(Exception, match="unsafe|private|too big") as caught:
    render(template)
  assert type(caught.value).__module__ in ("jinja2.exceptions", "builtins")
  # What is not there is empty.
  assert render("{{ '{0.__class__}'.format(1) }}{{ lipsum.__globals__ }}") == ""


def made(template=None, *special, bos_id=None):
  return dataclasses.replace(
    control_tokens_test.made(*special, bos_id=bos_id),
    chat_template=template,
    names={"bos_token": special[0]} if special else {},
  )


def test_tokens_are_those_that_the_template_writes():
  """A begin token is the template's affair, as in transformers."""
  for template, begin in (("{{ bos_token }}", [256]), ("", [])):
    tokenizer = made(template + "{{ messages[-1].content }}", "<s>", bos_id=256)
    first, second = chat.encode(tokenizer, [CHAT, CHAT[:1]])
    assert first.tolist() == begin + tokenizer.encode("Ho").tolist()
    assert second.tolist() == begin + tokenizer.encode("Be brief.").tolist()
  with pytest.raises(InputError, match="writes nothing"):
    chat.encode(made("{{ x }}"), [CHAT])


def test_many_chats_are_written_by_several_processes(monkeypatch):
  monkeypatch.setattr(chat, "_CHATS", 2)
  chats = [[{"role": "user", "content": str(i)}] for i in range(3)]
  found = chat.write(made("{{ messages[0].content }}"), chats)
  assert found == ["0", "1", "2"]


def test_without_a_template_a_chat_is_chatml():
  tokenizer = made(None, "<s>", "<|im_start|>", "<|im_end|>", bos_id=256)
  text = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <é>\n"
    "<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
  )
  for begin, end in ((False, ""), (True, "<|im_start|>assistant\n")):
    found = chat.write(tokenizer, [CHAT], begin_answer=begin)
    assert found == [text + end]
  (tokens,) = chat.encode(tokenizer, [CHAT])
  np.testing.assert_array_equal(
    tokens, [256, *tokenizer.encode(text + "<|im_start|>assistant\n")]
  )
  with pytest.raises(InputError, match="--chat"):
    chat.write(made(None, "<|im_start|>"), [CHAT])


@pytest.mark.parametrize(
  "template, why",
  [
    ("{{ raise_exception('no\n system turn') }}", "no system turn"),
    ("{% for %}", "Expected an expression"),
    ("{{ 1 // 0 }}", "zero"),
    # Without end, and without a call of Python's that a signal could stop.
    ("{% set r = range(99999) %}" + "{% for a in r %}" * 3 + "{% endfor %}" * 3,
     "longer than 1 s"),
    ("{{ 3 ** (3 ** 20) }}", "longer than 1 s"),
    ("{{ 'a' * 10 ** 9 }}", "over 256 MB"),
    ("{{ '%1000000000d' % 1 }}", "over 256 MB"),
    ("{% set n = namespace(x='ab') %}{% for i in range(99) %}"
     "{% set n.x = n.x ~ n.x %}{% endfor %}", "over 256 MB"),
    ("{% for i in range(99999) %}0123456789{% endfor %}", "characters"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "recursion"),
  ],
)  # fmt: skip
def test_a_template_that_fails_is_one_line_in_bounded_time(
  template, why, monkeypatch
):
  monkeypatch.setattr(chat, "_SECONDS", 1)
  began = time.monotonic()
  with pytest.raises(InputError) as caught:
    chat.write(made(template), [CHAT])
  assert time.monotonic() - began < 30
  message = str(caught.value)
  assert "template fails (" in message and why in message
  assert message.endswith("without --chat")
  assert len(message) < 400 and "\n" not in message


def test_a_process_that_hangs_is_ended(monkeypatch):
  monkeypatch.setattr(chat, "_PATIENCE", 0.01)
  with pytest.raises(InputError, match="longer than 0.01 s"):
    chat.write(made("x"), [CHAT])


def test_a_template_without_jinja2_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "jinja2", None)
  with pytest.raises(InputError, match="pip install jinja2"):
    chat.write(dataclasses.replace(made(), chat_template="x"), [CHAT])
