"""Ids against the package; `golden/generate_sentencepiece.py` made them."""

import pathlib

import numpy as np
import pytest

from models import sentence_piece
from models import tokenizer as tokenizer_lib
from models.errors import InputError

_GOLDEN = pathlib.Path(__file__).parent / "golden/sentencepiece.npz"
_OPTIONS = ("plain", "bytes", "spaces", "marks", "rules")
_NAMES = [f"{k}_{option}" for k in ("unigram", "bpe") for option in _OPTIONS]


@pytest.fixture(scope="module")
def golden():
  with np.load(_GOLDEN) as file:
    arrays = dict(file)
  assert list(arrays["names"]) == _NAMES
  texts = arrays["texts"].tobytes().decode().split("\0")
  return arrays, texts


def write(golden, name, folder):
  path = folder / f"{name}.model"
  path.write_bytes(golden[0][f"{name}.model"].tobytes())
  return path


@pytest.mark.parametrize("name", _NAMES)
def test_ids_are_those_of_the_package(golden, name, tmp_path):
  arrays, texts = golden
  tokenizer = sentence_piece.read(write(golden, name, tmp_path))
  ends = np.cumsum(arrays[f"{name}.lengths"])
  rows = np.split(arrays[f"{name}.ids"], ends[:-1])
  assert len(rows) == len(texts) > 80 and len(ends) > 0
  for text, expected in zip(texts, rows):
    np.testing.assert_array_equal(tokenizer.encode(text), expected, text)
  # A saved one is the same.
  tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
  again = tokenizer_lib.from_json(tmp_path / "tokenizer.json")
  assert again.vocab_size == tokenizer.vocab_size and again.bos_id is None
  for text in texts:
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize("name", ["unigram_bytes", "bpe_bytes"])
def test_texts_come_back(golden, name, tmp_path):
  tokenizer = sentence_piece.read(write(golden, name, tmp_path))
  for text in ("lr=0.001 depth=12", "naïve 漢字", "two words"):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_damaged_files_are_one_line(golden, tmp_path):
  whole = write(golden, "bpe_bytes", tmp_path).read_bytes()
  generator, path = np.random.default_rng(0), tmp_path / "damaged.model"
  refused = 0
  for trial in range(60):
    data = bytearray(whole)
    if trial % 2:
      data = data[: generator.integers(len(data))]
    else:
      place = generator.integers(len(data) - 8)
      data[place : place + 8] = generator.bytes(8)
    path.write_bytes(data)
    try:
      sentence_piece.read(path)
    except InputError as error:
      assert "\n" not in str(error) and "damaged.model" in str(error)
      refused += 1
  assert refused > 30
  path.write_bytes(b"")
  with pytest.raises(InputError, match="no piece stands for what is unknown"):
    sentence_piece.read(path)
  with pytest.raises(InputError, match="is missing"):
    sentence_piece.read(tmp_path / "none.model")


def test_what_is_not_supported_is_told(golden, tmp_path):
  """Fields are added: the last one of a number counts."""
  whole = write(golden, "unigram_plain", tmp_path).read_bytes()
  path = tmp_path / "other.model"
  for field, words in (
    (b"\x12\x02\x18\x03", "model type 3"),
    (b"\x12\x03\xc0\x01\x01", "spaces behind words"),
    (b"\x0a\x05\x0a\x01q\x18\x05", "unused pieces"),
    (b"\x0a\x05\x0a\x03<s>", "repeats a piece"),
  ):
    path.write_bytes(whole + field)
    with pytest.raises(InputError, match=words):
      sentence_piece.read(path)
