import json
import os
import pathlib
import time
from concurrent import futures

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import models as bpe_models
from tokenizers import pre_tokenizers, processors

from models import control_tokens, encoding, tokenizer
from models.convert import Checkpoint, load
from models.errors import InputError
from models.text import load_text
from models.transformer_config import TransformerConfig

_TEXTS = (
  "Once upon a time, there was a little boy named Ben.",
  " two  spaces, a tab\t and\n\nlines \n",
  "naïve “quotes” 日本語 ½ 1234 <0x0A> <s>",
  "oooooooo ppppp llllll",
  " ",
  "",
)


def _checkpoint(path):
  return Checkpoint(
    config=TransformerConfig.tiny(vocab_size=300),
    params={},
    name="test",
    path=path,
  )


@pytest.fixture(scope="module")
def tiny():
  return load("tiny")


def _greedy_encode(path, vocab_size, text):
  """The encoder of llama2.c as published: merge the best pair, from scratch."""
  tokens, scores = tokenizer._read_llama2c(path, vocab_size)
  ids_of = {token: i for i, token in enumerate(tokens)}
  ids = [ids_of[" "]] if text else []
  for character in text:
    if character in ids_of:
      ids.append(ids_of[character])
    else:
      ids.extend(byte + 3 for byte in character.encode())
  while True:
    best, at, union = -np.inf, None, None
    for i in range(len(ids) - 1):
      merged = ids_of.get(tokens[ids[i]] + tokens[ids[i + 1]])
      if merged is not None and scores[merged] > best:
        best, at, union = scores[merged], i, merged
    if at is None:
      return ids
    ids[at : at + 2] = [union]


def test_llama2c_equals_the_greedy_definition(tiny):
  path = tiny.path.parent / "tok512.bin"
  encoder = tokenizer.load_tokenizer(tiny)
  pieces = [*tokenizer._read_llama2c(path, 512)[0][259:], "é", "日", "\t"]
  rng = np.random.default_rng(0)
  random = ["".join(rng.choice(pieces, 60)) for _ in range(50)]
  repeats = ["".join(rng.choice(list("lopt "), 50)) for _ in range(50)]
  wikitext = load_text("wikitext2:valid")
  slices = [wikitext[i : i + 150] for i in range(0, 300_000, 10_000)]
  for text in (*_TEXTS, *random, *repeats, *slices):
    ids = encoder.encode(text)
    assert ids.tolist() == _greedy_encode(path, 512, text), text
    assert encoder.decode(ids) == text


def test_llama2c_properties(tiny):
  encoder = tokenizer.load_tokenizer(tiny)
  assert (encoder.vocab_size, encoder.bos_id) == (512, 1)
  assert encoder.encode("Once").dtype == np.int32
  assert encoder.encode("").shape == (0,)


def test_a_long_text_takes_seconds(tiny):
  encoder = tokenizer.load_tokenizer(tiny)
  text = load_text("wikitext2:test")
  start = time.process_time()
  ids = encoder.encode(text)
  assert time.process_time() - start < 20
  assert encoder.decode(ids) == text


def test_damaged_llama2c_tokenizers_name_the_file(tmp_path, tiny):
  whole = (tiny.path.parent / "tok512.bin").read_bytes()
  path = tmp_path / "tok512.bin"
  for content in (None, whole[:3000], whole[:-1], b""):
    if content is not None:
      path.write_bytes(content)
    with pytest.raises(InputError) as caught:
      tokenizer.from_llama2c(path, 512)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def _bytes_to_unicode():
  return sorted(pre_tokenizers.ByteLevel.alphabet())


def _write_gguf(path, pre="smollm", **fields):
  tokens = ["<|end|>", *_bytes_to_unicode(), "12", "Ġa", "Ġ1", "he", "Ġhe"]
  types = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1)
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_token_merges(["1 2", "Ġ a", "Ġ 1", "h e", "Ġ he"])
  for add, value in fields.items():
    getattr(writer, add)(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tokens


def test_gguf_smollm(tmp_path):
  path = tmp_path / "model.gguf"
  tokens = _write_gguf(path)
  encoder = tokenizer.load_tokenizer(_checkpoint(path))
  assert (encoder.vocab_size, encoder.bos_id) == (len(tokens), None)
  for text in _TEXTS:
    assert encoder.decode(encoder.encode(text)) == text
  # Digits stand alone, without the space before them, whatever merges there
  # are.
  ids = encoder.encode("he a 12 he")
  assert [tokens[i] for i in ids] == ["he", "Ġa", "Ġ", "1", "2", "Ġhe"]
  ids = encoder.encode("he<|end|>")
  assert [tokens[i] for i in ids] == ["he", "<|end|>"]
  assert encoder.decode(ids) == "he"


def _json_tokenizer(bos):
  vocab = {token: i for i, token in enumerate(["<s>", *_bytes_to_unicode()])}
  backend = tokenizers.Tokenizer(bpe_models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["<s>"])
  if bos:
    backend.post_processor = processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 0)]
    )
  return backend


@pytest.mark.parametrize("bos", [False, True])
def test_tokenizer_json(bos, tmp_path):
  _json_tokenizer(bos).save(str(tmp_path / "tokenizer.json"))
  encoder = tokenizer.load_tokenizer(_checkpoint(tmp_path))
  assert encoder.bos_id == (0 if bos else None)
  assert encoder.vocab_size == 257
  for text in _TEXTS[:2]:
    ids = encoder.encode(text)
    assert len(ids) == len(text.encode())
    assert encoder.decode(ids) == text


def test_tokenizer_json_beside_a_gguf_wins(tmp_path):
  _write_gguf(tmp_path / "model.gguf", pre="poro-chat")
  _json_tokenizer(True).save(str(tmp_path / "tokenizer.json"))
  encoder = tokenizer.load_tokenizer(_checkpoint(tmp_path / "model.gguf"))
  assert encoder.vocab_size == 257


def test_missing_or_damaged_tokenizer_json_is_named(tmp_path):
  path: pathlib.Path = tmp_path / "tokenizer.json"
  for content in (None, json.dumps({"model": 1}), "{"):
    if content is not None:
      path.write_text(content)
    with pytest.raises(InputError) as caught:
      tokenizer.load_tokenizer(_checkpoint(tmp_path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def _write_model(folder, backend, **files):
  """A tokenizer of Hugging Face with the files beside it."""
  backend.save(str(folder / "tokenizer.json"))
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return _checkpoint(folder)


def _words(*words, **options):
  backend = tokenizers.Tokenizer(
    bpe_models.WordLevel({w: i for i, w in enumerate(words)}, **options)
  )
  backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  return backend


@pytest.mark.parametrize(
  "files, ends",
  [
    ({}, ()),
    ({"config": {"eos_token_id": 2}}, (2,)),
    ({"generation_config": {"eos_token_id": [3, 2, 99, "x", True]}}, (3, 2)),
    ({"tokenizer_config": {"eos_token": {"content": "T"}}}, (4,)),
    (
      {
        "tokenizer_config": {"eos_token": "T"},
        "generation_config": {"eos_token_id": 3},
        "config": {"eos_token_id": [2, 3]},
      },
      (4, 3, 2),
    ),
  ],
)
def test_ends_are_those_that_the_files_name(tmp_path, files, ends):
  checkpoint = _write_model(tmp_path, _words(*"|ACGTN"), **files)
  found = tokenizer.load_tokenizer(checkpoint)
  assert found.end_ids == ends
  assert control_tokens.end_ids(found) == ends


def test_the_template_of_chats_is_read(tmp_path):
  named = [{"name": "x", "template": "1"}, {"name": "default", "template": "2"}]
  for files, expected in (
    ({"tokenizer_config": {"chat_template": "0"}}, "0"),
    ({"tokenizer_config": {"chat_template": named}}, "2"),
    ({"tokenizer_config": {}, "chat_template": {"chat_template": "3"}}, "3"),
  ):
    checkpoint = _write_model(tmp_path, _words(*"|AC"), **files)
    assert tokenizer.load_tokenizer(checkpoint).chat_template == expected
  (tmp_path / "chat_template.jinja").write_text("4")
  assert tokenizer.load_tokenizer(checkpoint).chat_template == "4"
  (tmp_path / "tokenizer_config.json").write_text("[]")
  with pytest.raises(InputError, match="tokenizer_config.json"):
    tokenizer.load_tokenizer(checkpoint)


def test_a_vocabulary_without_an_a_is_read(tmp_path):
  checkpoint = _write_model(tmp_path, _words(*"|CGT", unk_token="[UNK]"))
  found = tokenizer.load_tokenizer(checkpoint)
  assert found.encode("GCT").tolist() == [2, 1, 3] and found.bos_id is None
  with pytest.raises(InputError, match="cannot read 'GAC'"):
    found.encode("GAC")
  assert found.encode_all(["GG", ""]) == [[2, 2], []]
  with pytest.raises(InputError, match="cannot read one of the texts"):
    found.encode_all(["G", "A"])


def test_the_largest_id_counts(tmp_path):
  backend = tokenizers.Tokenizer(bpe_models.WordLevel({"a": 0, "b": 200}))
  checkpoint = _write_model(tmp_path, backend)
  assert tokenizer.load_tokenizer(checkpoint).vocab_size == 201
  backend = tokenizers.Tokenizer(bpe_models.WordLevel({"a": 0, "b": 300}))
  checkpoint = _write_model(tmp_path, backend)
  with pytest.raises(InputError, match="301 tokens, the model 300"):
    tokenizer.load_tokenizer(checkpoint)


def test_a_panic_alone_is_kept_from_stderr(tmp_path, capfd):
  path = tmp_path / "tokenizer.json"
  backend = _words(*"|AC")
  backend.pre_tokenizer = pre_tokenizers.Split(
    tokenizers.Regex("^((A)+.)+C(A)+$"), "isolated"
  )
  backend.save(str(path))
  found = tokenizer.from_json(path)

  def told(_):
    with pytest.raises(InputError, match=f"{path}: its pattern takes too long"):
      found.encode("A" * 60)

  with futures.ThreadPoolExecutor(4) as threads:
    list(threads.map(told, range(4)))
  with encoding.quiet_panics():
    os.write(2, b"of another thread")
  assert capfd.readouterr().err == "of another thread"
