"""Tokenizers inside GGUF files against the same ones in their own form."""

import json
import pathlib

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers, trainers

from models import control_tokens, gguf_tokenizer, sentence_piece, tokenizer
from models.convert import Checkpoint
from models.errors import InputError
from models.transformer_config import TransformerConfig

_GOLDEN = pathlib.Path(__file__).parent / "golden/sentencepiece.npz"
CONTROL, USER, NORMAL = (
  int(getattr(gguf.TokenType, name))
  for name in ("CONTROL", "USER_DEFINED", "NORMAL")
)
TEXTS = [
  "",
  "Once upon a time I'll say they'RE 12345 and 1,234.5",
  "  two spaces \t tab\r\n\r\nlines\n\n\n  3/4 ½ ²",
  "naïve cafe\u0301 日本語、漢字 안녕 😀 ٣٤",
  "camelCase HTTPServer x_y=z//w; don't",
  "<|end|>and <think>this</think> <|en",
]
# As the files `tokenizer.json` of these models have them.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
  r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex):
  return {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": use_regex,
  }


def _split(pattern):
  split = {"type": "Split", "behavior": "Isolated", "invert": False}
  return {
    "type": "Sequence",
    "pretokenizers": [
      split | {"pattern": {"Regex": pattern}},
      _byte_level(False),
    ],
  }


_DIGITS = {"type": "Digits", "individual_digits": True}
JSON = {
  "gpt-2": {"pre_tokenizer": _byte_level(True)},
  "smollm": {
    "pre_tokenizer": {
      "type": "Sequence",
      "pretokenizers": [_DIGITS, _byte_level(True)],
    }
  },
  "llama-bpe": {"pre_tokenizer": _split(_LLAMA3), "ignore_merges": True},
  "qwen2": {
    "pre_tokenizer": _split(_LLAMA3.replace("{1,3}", "")),
    "normalizer": {"type": "NFC"},
  },
  "tekken": {"pre_tokenizer": _split(_TEKKEN), "ignore_merges": True},
}


@pytest.fixture(scope="module")
def trained():
  """A small byte-level BPE with tokens beside its merges, as JSON."""
  backend = tokenizers.Tokenizer(token_models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.train_from_iterator(
    TEXTS * 2,
    trainers.BpeTrainer(
      vocab_size=400,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  backend.add_special_tokens(["<|begin|>", "<|end|>"])
  backend.add_tokens(["<think>", "</think>"])
  return json.loads(backend.to_str())


def original(trained, pre):
  described = json.loads(json.dumps(trained))
  changes = dict(JSON[pre])
  described["model"]["ignore_merges"] = changes.pop("ignore_merges", False)
  # A token that no merges make: taken whole where they are ignored.
  marks = {x["content"]: x["id"] for x in described["added_tokens"]}
  described["model"]["vocab"] |= marks | {"HTTPServer": 384}
  described |= {"decoder": _byte_level(True)} | changes
  return tokenizers.Tokenizer.from_str(json.dumps(described))


def write(path, fields):
  """A GGUF file with metadata: `add_NAME` of the package, or a whole key."""
  writer = gguf.GGUFWriter(path, "llama")
  for name, value in fields.items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def fields_of(backend, pre):
  """What llama.cpp's converter makes of a tokenizer.json."""
  described = json.loads(backend.to_str())
  kinds = {
    token["content"]: CONTROL if token["special"] else USER
    for token in described["added_tokens"]
  }
  tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
  return {
    "tokenizer_model": "gpt2",
    "tokenizer_pre": pre,
    "token_list": tokens,
    "token_types": [kinds.get(token, NORMAL) for token in tokens],
    "token_merges": [" ".join(pair) for pair in described["model"]["merges"]],
  }


@pytest.mark.parametrize("pre", JSON)
def test_byte_pairs_are_those_of_the_tokenizer_json(trained, pre, tmp_path):
  backend = original(trained, pre)
  path = write(tmp_path / "m.gguf", fields_of(backend, pre))
  found = gguf_tokenizer.read(path)
  assert found.vocab_size == 385
  for text in TEXTS:
    expected = backend.encode(text, add_special_tokens=False)
    assert found.backend.encode(text).tokens == expected.tokens, text
    assert found.encode(text).tolist() == expected.ids
    assert found.decode(found.encode(text)) == backend.decode(expected.ids)
  # Control tokens are no text, others are.
  text = "a<think>b<|end|>"
  assert found.decode(found.encode(text)) == "a<think>b"


def test_begin_and_ends_are_what_the_file_says(trained, tmp_path):
  path, backend = tmp_path / "m.gguf", original(trained, "llama-bpe")
  begin, end, think = map(backend.token_to_id, ("<|begin|>", "<|end|>", "a"))
  fields = fields_of(backend, "llama-bpe") | {
    "bos_token_id": begin,
    "eos_token_id": end,
    "eot_token_id": think,
    "chat_template": "{{ bos_token }}x",
  }
  found = gguf_tokenizer.read(write(path, fields))
  assert found.bos_id == begin and found.end_ids == (end, think)
  assert found.names == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
  assert found.chat_template == "{{ bos_token }}x"
  assert control_tokens.end_ids(found) == (end, think)
  # A tokenizer.json that is written of it says so as well.
  found.backend.save(str(tmp_path / "t.json"))
  assert tokenizer.from_json(tmp_path / "t.json").bos_id == begin
  for fields_, bos in (
    (fields | {"add_bos_token": False}, None),
    (fields | {"tokenizer_pre": "qwen2"}, None),
    (fields | {"tokenizer_pre": "qwen2", "add_bos_token": True}, begin),
    (fields | {"bos_token_id": 9999}, None),
  ):
    assert gguf_tokenizer.read(write(path, fields_)).bos_id == bos


@pytest.fixture(scope="module")
def golden():
  with np.load(_GOLDEN) as file:
    arrays = dict(file)
  return arrays, arrays["texts"].tobytes().decode().split("\0")


def pieces_of(golden, name, folder):
  path = folder / f"{name}.model"
  path.write_bytes(golden[0][f"{name}.model"].tobytes())
  model = sentence_piece._open(path)
  texts, scores, kinds = zip(*model.pieces)
  return path, {
    "tokenizer_model": "llama",
    "tokenizer_pre": "default",
    "token_list": list(texts),
    "token_scores": list(scores),
    "token_types": list(kinds),
    "add_space_prefix": model.dummy_prefix,
    "remove_extra_whitespaces": model.fewer_spaces,
  }


def expected_of(golden, name):
  """Texts without names of control pieces, and their ids."""
  arrays, texts = golden
  ends = np.cumsum(arrays[f"{name}.lengths"])[:-1]
  pairs = zip(texts, np.split(arrays[f"{name}.ids"], ends), strict=True)
  plain = [p for p in pairs if not any(n in p[0] for n in ("<s>", "<unk>"))]
  assert len(plain) > 70
  return plain


@pytest.mark.parametrize(
  "name", ["bpe_bytes", "bpe_spaces", "bpe_marks", "unigram_bytes"]
)
def test_a_language_model_has_the_pieces_of_sentencepiece(
  golden, name, tmp_path
):
  path, fields = pieces_of(golden, name, tmp_path)
  models = [sentence_piece.read_marked(path)]
  if name in ("bpe_bytes", "bpe_spaces"):
    models.append(gguf_tokenizer.read(write(tmp_path / "m.gguf", fields)))
  for model in models:
    for text, ids in expected_of(golden, name):
      np.testing.assert_array_equal(model.encode(text), ids, text)
    if name == "bpe_marks":
      assert (model.bos_id, model.end_ids) == (None, ())
      continue
    # Begin and end are searched for.
    assert (model.bos_id, model.end_ids) == (1, (2,))
    ids = model.encode("<s>lr</s>").tolist()
    assert ids[0] == 1 and ids[-1] == 2 and 0 not in ids
    assert model.decode(np.asarray(ids)) == "lr"


def test_a_folder_may_hold_a_model_of_sentencepiece(golden, tmp_path):
  path, _ = pieces_of(golden, "bpe_bytes", tmp_path)
  path.rename(tmp_path / "tokenizer.model")
  checkpoint = Checkpoint(
    config=TransformerConfig.tiny(vocab_size=512),
    params={},
    name="test",
    path=tmp_path,
  )
  found = tokenizer.load_tokenizer(checkpoint)
  assert found.bos_id == 1 and found.end_ids == (2,)
  assert found.decode(found.encode("two words")) == "two words"
  # Files beside it say what tokens follow.
  added = {str(found.vocab_size): {"content": "<call>", "special": False}}
  path = tmp_path / "tokenizer_config.json"
  described = {"add_bos_token": False, "added_tokens_decoder": added}
  path.write_text(json.dumps(described))
  more = {"<call>": found.vocab_size, "<|im_end|>": found.vocab_size + 1}
  (tmp_path / "added_tokens.json").write_text(json.dumps(more))
  longer = tokenizer.load_tokenizer(checkpoint)
  assert (longer.bos_id, longer.vocab_size) == (None, found.vocab_size + 2)
  assert found.vocab_size + 1 in control_tokens.end_ids(longer)
  ids = longer.encode("two<call>words<|im_end|>")
  assert found.vocab_size in ids and longer.decode(ids) == "two<call> words"
  for damaged in ({"9999": {"content": "x"}}, {"400": "x"}, ["x"]):
    path.write_text(json.dumps({"added_tokens_decoder": damaged}))
    with pytest.raises(InputError, match="added tokens are damaged"):
      tokenizer.load_tokenizer(checkpoint)


def test_a_tokenizer_json_beside_takes_the_files_template(trained, tmp_path):
  backend = original(trained, "smollm")
  fields = fields_of(backend, "smollm") | {
    "eos_token_id": 381,
    "chat_template": "from the file",
  }
  path = write(tmp_path / "m.gguf", fields)
  backend.save(str(tmp_path / "tokenizer.json"))
  checkpoint = Checkpoint(
    config=TransformerConfig.tiny(vocab_size=512),
    params={},
    name="test",
    path=path,
  )
  found = tokenizer.load_tokenizer(checkpoint)
  assert found.chat_template == "from the file" and found.end_ids == (381,)
  (tmp_path / "chat_template.jinja").write_text("beside")
  described = {"add_bos_token": True, "eos_token": "a"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
  found = tokenizer.load_tokenizer(checkpoint)
  assert found.chat_template == "beside"
  assert found.end_ids == (backend.token_to_id("a"), 381)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"tokenizer_pre": "poro-chat"}, "'poro-chat' is not supported"),
    ({"tokenizer_model": "t5"}, "'t5' is not supported"),
    ({"tokenizer_model": "gpt2", "token_list": ["a", "a"]}, "repeats a token"),
    ({"token_types": [1, 2]}, "lacks tokens or types"),
    ({"token_merges": ["a q"]}, "is damaged"),
    ({"tokenizer_model": "llama"}, "lacks scores"),
  ],
)
def test_what_cannot_be_read_is_one_line(trained, change, words, tmp_path):
  fields = fields_of(original(trained, "gpt-2"), "gpt-2") | change
  with pytest.raises(InputError, match=words) as caught:
    gguf_tokenizer.read(write(tmp_path / "m.gguf", fields))
  assert str(caught.value).startswith(str(tmp_path / "m.gguf"))
  assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer_says_what_to_do(tmp_path):
  path = write(tmp_path / "m.gguf", {})
  with pytest.raises(InputError, match="holds no tokenizer: .*--tokenizer"):
    gguf_tokenizer.read(path)
