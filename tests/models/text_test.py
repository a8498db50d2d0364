import gzip
import lzma
import pathlib

import pytest

from models import text
from models.errors import InputError

_SIZES = {
  "wikitext2:train": 2_882_720,
  "wikitext2:valid": 1_119_083,
  "wikitext2:test": 1_290_547,
  "gutenberg:slice": 2_985_382,
}


@pytest.mark.parametrize("name", _SIZES)
def test_shipped_texts_are_whole(name):
  assert len(text.load_text(name).encode()) == _SIZES[name]


def test_shipped_texts_look_as_their_readme_says():
  train, valid, test = (
    text.load_text(f"wikitext2:{part}") for part in ("train", "valid", "test")
  )
  for part in (train, valid, test):
    assert " @-@ " in part and " , " in part
    assert all(line.strip() for line in part.rstrip(" \n").split("\n"))
  assert "<unk>" not in train + test
  assert valid.count("<unk>") == 11_718
  readme = pathlib.Path(text.__file__).parents[1] / "data/corpora/README.md"
  assert "11,718" in readme.read_text()


def test_splits_share_no_line():
  splits = [
    {
      line
      for line in text.load_text(f"wikitext2:{part}").split("\n")
      if len(line) > 100
    }
    for part in ("train", "valid", "test")
  ]
  assert not splits[0] & splits[1]
  assert not splits[0] & splits[2]
  assert not splits[1] & splits[2]


def test_shipped_files_are_small():
  folder = pathlib.Path(text.__file__).parents[1] / "data/corpora"
  sizes = {path.name: path.stat().st_size for path in folder.glob("*.xz")}
  assert len(sizes) == len(_SIZES)
  assert max(sizes.values()) < 1_500_000


def test_own_files(tmp_path):
  content = "naïve\r\nlines\n"
  (tmp_path / "a.txt").write_bytes(content.encode())
  (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
  (tmp_path / "a.txt.xz").write_bytes(lzma.compress(content.encode()))
  for suffix in ("", ".gz", ".xz"):
    assert text.load_text(tmp_path / f"a.txt{suffix}") == content
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
  assert text.load_text(tmp_path / "a.txt") == content


def _fails(path, part):
  with pytest.raises(InputError) as caught:
    text.load_text(path)
  assert str(path) in str(caught.value)
  assert part in str(caught.value)
  assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path, monkeypatch):
  _fails(tmp_path / "none.txt", "no such text")
  _fails("wikitext2:dev", "wikitext2:valid")
  (tmp_path / "a.pdf").write_bytes(b"x")
  _fails(tmp_path / "a.pdf", ".txt")
  (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
  _fails(tmp_path / "b.txt", "UTF-8")
  whole = lzma.compress(b"abc" * 1000)
  (tmp_path / "c.txt.xz").write_bytes(whole[:-20])
  _fails(tmp_path / "c.txt.xz", "cut short")
  (tmp_path / "d.txt.xz").write_bytes(b"no xz")
  _fails(tmp_path / "d.txt.xz", "cannot be read")
  (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:-9])
  _fails(tmp_path / "e.txt.gz", "cut short")
  monkeypatch.setattr(text, "_CORPORA", tmp_path)
  with pytest.raises(InputError, match="wikitext2_valid"):
    text.load_text("wikitext2:valid")
