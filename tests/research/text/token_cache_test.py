import numpy as np
import pytest

from models.errors import InputError
from models.text import load_text
from research.text import documents, token_cache, tokenizing


@pytest.fixture(scope="module")
def slice_text():
  return load_text("gutenberg:slice")[:30000]


@pytest.fixture
def text(tmp_path):
  path = tmp_path / "text.txt"
  path.write_text("one é\n\x1e\ntwo\n\x1e\n\n\x1e\nthree\n")
  return str(path)


def documents_of(corpus, tokenizer):
  ends = [*corpus.starts[1:], len(corpus.tokens)]
  return [
    tokenizer.decode(corpus.tokens[start + 1 : end])
    for start, end in zip(corpus.starts, ends, strict=True)
  ]


@pytest.mark.parametrize(
  "rule, text, parts",
  [
    ("whole", "a\n\x1e\nb", ["a\n\x1e\nb"]),
    ("record", "a\n\x1e\nb", ["a", "b"]),
    ("auto", "a\n\x1e\nb\n\x1e\n \n\x1e\n", ["a", "b"]),
    ("auto", "a\n = b = \nc", ["a\n", " = b = \nc"]),
    ("wikitext", " = A = \n\n = = B = = \n = C = \n", [
      " = A = \n\n = = B = = \n", " = C = \n"
    ]),
    ("auto", "a\nb = c\n", ["a\nb = c\n"]),
    ("auto", "a \x1e\nb\x1e\n", ["a \x1e\nb\x1e\n"]),
    ("auto", "a\n\x1e\n\x1e\nb\n\x1e", ["a", "b"]),
    ("auto", "a\r\n\x1e\r\n\x1e\r\nb\r\nc", ["a", "b\r\nc"]),
    ("auto", "a\r\n = b = \r\nc", ["a\r\n", " = b = \r\nc"]),
    ("auto", "a\n<|endoftext|>\nb\n<|endoftext|>c<|endoftext|>", [
      "a", "b\n", "c"
    ]),
    ("auto", "a\n\x1e\n = b = \n<|endoftext|>c\x1e\n", [
      "a", " = b = \n", "c\x1e\n"
    ]),
    ("endoftext", "a<|endoftext|>b\n\x1e\n", ["a", "b\n\x1e\n"]),
    ("record", "a<|endoftext|>b\n\x1e\n", ["a<|endoftext|>b"]),
    ("auto", " \n", []),
  ],
)  # fmt: skip
def test_documents_by_rule(rule, text, parts):
  assert documents.split(text, rule) == parts


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
  "form", ["{0}\n\x1e\n", "{0}\n<|endoftext|>\n", " = Title = \n\n{0}\n"]
)
def test_120_documents_are_120(tmp_path, form, end):
  text = "".join(form.format(f"text {i}\nends.") for i in range(120))
  path = tmp_path / "a.txt"
  path.write_text(text + "one stray \x1e sign", newline=end)
  for rule in (
    "auto",
    {"=": "wikitext", "<": "endoftext"}.get(form[1], "auto"),
  ):
    found = token_cache.read_documents([str(path)], rule)
    assert len(found) == 120 + (form[0] != " ")


def test_records_are_documents_whatever_the_rule(tmp_path):
  tokenizer, path = tokenizing.of_bytes(), tmp_path / "a.jsonl"
  path.write_text(
    '{"text": "a\\n\\u001e\\nb", "c": "d"}\n{"text": "e", "c": "f"}'
  )
  load = lambda **options: token_cache.load_corpus(
    [str(path)], tokenizer, tmp_path / "cache", progress=False, **options
  )
  for rule in ("auto", "whole"):
    found = documents_of(load(rule=rule), tokenizer)
    assert found == ["a\n\x1e\nb", "e"]
  assert documents_of(load(field="c"), tokenizer) == ["d", "f"]
  assert len(list((tmp_path / "cache").iterdir())) == 3
  learned = token_cache.bpe([str(path)], "auto", 260, tmp_path / "cache", "c")
  assert learned.encode("df").shape == (2,)


def test_tokens_come_back_as_their_documents(tmp_path, text):
  tokenizer = tokenizing.of_bytes()
  folder = tmp_path / "cache"
  made = token_cache.load_corpus([text], tokenizer, folder, progress=False)
  assert documents_of(made, tokenizer) == ["one é", "two", "three\n"]
  np.testing.assert_array_equal(made.tokens[made.starts], 256)
  assert isinstance(made.tokens, np.memmap) and made.tokens.dtype == np.uint16
  # From the cache: nothing is encoded again.
  files = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  again = token_cache.load_corpus([text], tokenizer, folder, progress=False)
  np.testing.assert_array_equal(again.tokens, made.tokens)
  assert again.digest == made.digest
  assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == files
  assert not list(folder.glob("*.tmp"))


def test_other_texts_rules_and_tokenizers_have_other_caches(tmp_path, text):
  tokenizer = tokenizing.of_bytes()
  load = lambda *names, **options: token_cache.load_corpus(
    names, tokenizer, tmp_path / "cache", progress=False, **options
  )
  digests = {load(text).digest, load(text, text).digest}
  digests.add(load(text, rule="whole").digest)
  tokenizer = tokenizing.train_bpe(["some text"], 260)
  digests.add(load(text).digest)
  assert len(digests) == 4
  (tmp_path / "text.txt").write_text("other")
  digests.add(load(text).digest)
  assert len(digests) == 5


def test_long_documents_are_encoded_in_pieces(
  tmp_path, slice_text, monkeypatch
):
  path = tmp_path / "long.txt"
  path.write_text(slice_text)
  tokenizer = tokenizing.train_bpe([slice_text], 400)
  monkeypatch.setattr(token_cache, "_PIECE", 1000)
  monkeypatch.setattr(token_cache, "_GROUP", 5000)
  found = token_cache.load_corpus(
    [str(path)], tokenizer, tmp_path / "cache", progress=False
  )
  assert list(found.starts) == [0]
  assert documents_of(found, tokenizer) == [slice_text]
  whole = tokenizer.encode(slice_text)
  assert len(whole) <= len(found.tokens) - 1 < len(whole) + 30


def test_progress_is_shown_while_tokenizing(tmp_path, text, capsys):
  token_cache.load_corpus([text], tokenizing.of_bytes(), tmp_path / "cache")
  assert "tokenize" in capsys.readouterr().err


def test_a_damaged_cache_is_told(tmp_path, text):
  tokenizer, folder = tokenizing.of_bytes(), tmp_path / "cache"
  load = lambda: token_cache.load_corpus(
    [text], tokenizer, folder, progress=False
  )
  place = folder / load().digest
  data = (place / "tokens.bin").read_bytes()
  changed = bytes([data[0] ^ 1]) + data[1:]
  for damaged in (data[:-4], data[:-1], b"", changed, data + data[:2]):
    (place / "tokens.bin").write_bytes(damaged)
    with pytest.raises(InputError, match="damaged: remove it"):
      load()
  (place / "tokens.bin").write_bytes(data)
  load()
  np.save(place / "starts.npy", np.asarray([0, 5, 1]))
  with pytest.raises(InputError, match="damaged: remove it"):
    load()


def test_a_bpe_is_learned_once(tmp_path, slice_text, monkeypatch):
  path = tmp_path / "slice.txt"
  path.write_text(slice_text)
  learn = lambda: token_cache.bpe([str(path)], "auto", 300, tmp_path / "cache")
  tokenizer = learn()
  assert tokenizer.vocab_size == 300
  ids = tokenizer.encode(slice_text)
  assert tokenizer.decode(ids) == slice_text
  monkeypatch.setattr(tokenizing, "train_bpe", None)
  np.testing.assert_array_equal(learn().encode(slice_text), ids)


@pytest.mark.parametrize(
  "names, says", [([], "name at least one"), (["none.txt"], "no such text")]
)
def test_missing_texts_are_told(tmp_path, names, says):
  with pytest.raises(InputError, match=says):
    token_cache.load_corpus(names, tokenizing.of_bytes(), tmp_path)


def test_an_empty_text_is_told(tmp_path):
  (tmp_path / "text.txt").write_text(" \n")
  with pytest.raises(InputError, match="nothing but blanks"):
    token_cache.load_corpus(
      [str(tmp_path / "text.txt")], tokenizing.of_bytes(), tmp_path / "cache"
    )
