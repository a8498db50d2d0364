import gzip
import json

import huggingface_hub
import numpy as np
import pytest

from models import control_tokens
from models.convert import Checkpoint
from models.errors import InputError
from models.transformer_config import TransformerConfig
from research.text import tokenizing

TEXT = "Grüße, 世界!\n\n\ttwo  spaces \U0001f600"


@pytest.fixture
def saved(tmp_path):
  tokenizer = tokenizing.train_bpe([TEXT] * 4, 280)
  path = tmp_path / "tokenizer.json"
  tokenizer.backend.save(str(path))
  return tokenizer, path


def test_bytes_are_those_of_utf8():
  tokenizer = tokenizing.load("bytes")
  ids = tokenizer.encode(TEXT)
  np.testing.assert_array_equal(ids, list(TEXT.encode()))
  assert tokenizer.decode(ids) == TEXT
  assert tokenizer.vocab_size == 257
  assert control_tokens.start_id(tokenizer) == 256


def test_a_bpe_reads_any_text_and_is_the_same_every_time():
  tokenizer = tokenizing.train_bpe([TEXT] * 4, 280)
  again = tokenizing.train_bpe([TEXT] * 4, 280)
  assert tokenizer.backend.to_str() == again.backend.to_str()
  assert tokenizer.vocab_size == 280
  assert control_tokens.start_id(tokenizer) == 0
  ids = tokenizer.encode(TEXT)
  assert len(ids) < len(TEXT.encode())
  assert tokenizer.decode(ids) == TEXT
  assert tokenizer.decode(tokenizer.encode("другое \x00")) == "другое \x00"


def test_a_sentencepiece_has_digits_apart_and_reads_any_text():
  texts = ["lr=0.125 depth=12", "width=512\n depth=120  lr=0.5"] * 4
  tokenizer = tokenizing.train_sentencepiece(texts, 300)
  again = tokenizing.train_sentencepiece(texts, 300)
  assert tokenizer.backend.to_str() == again.backend.to_str()
  assert 270 < tokenizer.vocab_size <= 300 and tokenizer.bos_id is None
  name = tokenizer.backend.id_to_token
  assert [name(i) for i in (0, 1, 2)] == ["<pad>", "<unk>", "<0x00>"]
  pieces = [name(i) for i in tokenizer.encode("depth=120")]
  assert pieces == ["\u2581depth=", "1", "2", "0"]
  for text in ("depth=3 lr=7", "\U0001f600 Grüße", "<unk> <pad> <0x41>"):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids.min() > 1
  # Runs of whitespace are one space, as in the package.
  assert tokenizer.decode(tokenizer.encode(" a\n\t b ")) == "a b"


def test_a_model_of_sentencepiece_by_path(tmp_path):
  path = tmp_path / "spiece.model"
  pieces = [("<unk>", 2), ("\u2581", 1), ("a", 1), ("\u2581a", 1)]
  path.write_bytes(
    b"".join(
      bytes([10, len(text.encode()) + 9, 10, len(text.encode())])
      + text.encode()
      + b"\x15"
      + np.float32(-number).tobytes()
      + bytes([24, kind])
      for number, (text, kind) in enumerate(pieces)
    )
  )
  for marks in (False, True):
    tokenizer = tokenizing.load(str(path), marks=marks)
    assert list(tokenizer.encode("a aq")) == [3, 3, 0]
  with pytest.raises(InputError, match="no such tokenizer"):
    tokenizing.load(str(tmp_path / "no.model"))


def test_long_words_are_learned_from_in_parts(monkeypatch):
  learners = (tokenizing.train_bpe, tokenizing.train_sentencepiece)
  plain = [train([TEXT] * 4, 300).backend.to_str() for train in learners]
  monkeypatch.setattr(tokenizing, "_LONGEST_WORD", 4)
  for train, before in zip(learners, plain, strict=True):
    tokenizer = train(["ab" * 1000], 300)
    pieces = [piece for piece in tokenizer.backend.get_vocab() if "ba" in piece]
    assert pieces and max(map(len, pieces)) <= 4
    # Words that are read later are not cut.
    assert "Split" not in str(tokenizing.train_bpe(["a"], 260).backend)
    assert tokenizer.decode(tokenizer.encode("ab" * 9)) == "ab" * 9
    assert train([TEXT] * 4, 300).backend.to_str() != before


def test_progress_is_shown_while_much_is_learned(monkeypatch, capsys):
  tokenizing.train_bpe([TEXT], 280)
  assert not capsys.readouterr().err
  monkeypatch.setattr(tokenizing, "_QUICK", 10)
  tokenizing.train_bpe([TEXT], 280, progress=False)
  assert not capsys.readouterr().err
  tokenizing.train_bpe([TEXT], 280)
  assert f"characters: {len(TEXT)}/{len(TEXT)}" in capsys.readouterr().err


def test_large_texts_are_sampled_evenly(monkeypatch):
  monkeypatch.setattr(tokenizing, "_BPE_CHARACTERS", 1000)
  monkeypatch.setattr(tokenizing, "_PIECE", 100)
  parts = list(tokenizing._sample(["a" * 1500, "b" * 2500], progress=False))
  assert sum(map(len, parts)) == 1100
  assert "".join(parts).count("b") == 700


def test_files_beside_say_where_texts_end(saved, tmp_path):
  config = {"eos_token": "a", "chat_template": "x"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  end = saved[0].backend.token_to_id("a")
  (tmp_path / "m").mkdir()
  described = {"eos_token_id": [7, 9]}
  (tmp_path / "m/generation_config.json").write_text(json.dumps(described))
  checkpoint = Checkpoint(
    config=TransformerConfig.tiny(vocab_size=300),
    params={},
    name="test",
    path=tmp_path / "m",
  )
  for name in (str(saved[1]), str(tmp_path)):
    found = tokenizing.load(name)
    assert found.end_ids == (end,) and found.chat_template == "x"
    # Those of the model count with the tokenizer that it is given.
    assert tokenizing.of_checkpoint(checkpoint, name).end_ids == (end, 7, 9)
  assert tokenizing.of_checkpoint(checkpoint, "bytes").end_ids == ()


@pytest.mark.parametrize("form", ["file", "folder", "gzip"])
def test_a_tokenizer_by_path(saved, form, tmp_path):
  tokenizer, path = saved
  if form == "folder":
    path = tmp_path
  if form == "gzip":
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress((tmp_path / "tokenizer.json").read_bytes()))
  found = tokenizing.load(str(path))
  np.testing.assert_array_equal(found.encode(TEXT), tokenizer.encode(TEXT))


@pytest.mark.parametrize(
  "name, hub_id", [*tokenizing.HUB_IDS.items(), ("a/b", "a/b")]
)
def test_names_are_hub_ids(saved, monkeypatch, name, hub_id):
  asked = []

  def download(hub_id, allow_patterns, **_):
    asked.append((hub_id, "tokenizer.json" in allow_patterns))
    return str(saved[1].parent)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert tokenizing.load(name).vocab_size == 280
  assert asked == [(hub_id, True)]


def test_what_the_hub_does_not_give_is_told(monkeypatch):
  def download(*_, **__):
    raise ConnectionError("no network")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  with pytest.raises(InputError, match="--tokenizer=.*gpt2.*ConnectionError"):
    tokenizing.load("gpt2")


@pytest.mark.parametrize(
  "name", ["neox", "none.json", "none/t.json.gz", "a/b/c"]
)
def test_unknown_names_list_the_valid_ones(name):
  with pytest.raises(InputError, match="gpt-neox, gpt2, smollm2, llama2"):
    tokenizing.load(name)


@pytest.mark.parametrize("name", ["bad.json", "bad.json.gz"])
def test_damaged_files_are_told(tmp_path, name):
  (tmp_path / name).write_bytes(b"{")
  with pytest.raises(InputError, match="no readable tokenizer"):
    tokenizing.load(str(tmp_path / name))
