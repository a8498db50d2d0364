"""Records of JSON lines and Parquet files as texts."""

import gzip
import importlib.util
import json
import lzma
import sys

import pytest

from models import input_files, text, text_records
from models.errors import InputError

RECORDS = [
  {"text": "one\u2028é\n", "n": 1},
  {"text": None, "body": "x"},
  {"text": " \n"},
  {"text": "two\n\x1e\nparts"},
]
FOUND = ["one\u2028é\n", "two\n\x1e\nparts"]


def lines(records, **options):
  return "".join(json.dumps(r, **options) + "\r\n" for r in records).encode()


def refusal(path, *field):
  with pytest.raises(InputError) as caught:
    text.load_text(path, *field)
  assert "\n" not in str(caught.value) and str(path) in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  "suffix, pack",
  [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)],
)
def test_json_lines(suffix, pack, tmp_path):
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(pack(lines(RECORDS, ensure_ascii=False) + b"\n"))
  assert text.load_parts(path) == (FOUND, True)
  assert text.load_text(path) == "\n\n".join(FOUND)


@pytest.mark.parametrize(
  "data, words",
  [
    (b'{"text": "a"}\n{"text": 5}\n', "line 2: 'text' is 5, no text"),
    (b'{"text": ["a"]}', "line 1: 'text' is ['a'], no text"),
    (b'{"text": "a"}\n\n{"tex": "b", "n": 2}', "line 3: has no field 'text', "
     "only 'tex', 'n': name another as --text_field"),
    (b'["a"]', "line 1: is no JSON object"),
    (b'{"text": "a"', "line 1: is no readable JSON"),
    (b'{"text": "a"}{"text": "b"}', "line 1: is no readable JSON"),
    (b"\xff", "is not UTF-8"),
  ],
)  # fmt: skip
def test_what_is_no_record_is_one_line(data, words, tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(data)
  assert words in refusal(path)


def test_the_field_is_the_users(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(lines([{"content": "a", "text": 1}, {"content": "b"}]))
  assert text.load_parts(path, "content") == (["a", "b"], True)


def test_markdown_is_a_text(tmp_path):
  (tmp_path / "a.md").write_text("# Title\n\ntext\n")
  assert text.load_parts(tmp_path / "a.md") == (["# Title\n\ntext\n"], False)


def test_parquet_without_its_package_is_one_line(tmp_path, monkeypatch):
  path = tmp_path / "a.parquet"
  path.write_bytes(b"PAR1")
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n: None if n == "pyarrow" else find(n)
  )
  for call in (text.text_path, text.load_text):
    with pytest.raises(InputError, match="pip install pyarrow.*to .jsonl"):
      call(path)


class _Batch:
  """One column of rows, as pyarrow gives it."""

  def __init__(self, rows):
    self.rows, self.nbytes = rows, sum(len(str(row)) for row in rows)

  def column(self, index):
    assert index == 0
    return self

  def to_pylist(self):
    return self.rows


def test_rows_of_parquet_are_read_in_bounds(tmp_path, monkeypatch):
  """A stand-in for the package, which is not among those of the tests."""
  path = tmp_path / "a.parquet"
  path.write_bytes(b"PAR1")
  asked = []

  class File:
    def __init__(self, path):
      self.schema_arrow = type("Schema", (), {"names": ["text", "n"]})

    def __enter__(self):
      return self

    def __exit__(self, *_):
      return None

    def iter_batches(self, size, columns):
      asked.append(columns)
      yield _Batch([r.get("text") for r in RECORDS[:2]])
      yield _Batch([r.get("text") for r in RECORDS[2:]])

  parquet = type("parquet", (), {"ParquetFile": File})
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  monkeypatch.setitem(
    sys.modules, "pyarrow", type("m", (), {"parquet": parquet})
  )
  assert text.load_parts(path) == (FOUND, True) and asked == [["text"]]
  assert "has no field 'body', only 'text', 'n'" in refusal(path, "body")
  with input_files.unpacking(15):
    assert "--most_unpacked_mb" in refusal(path)


def test_real_files_of_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  path = tmp_path / "a.parquet"
  columns = {"text": [r.get("text") for r in RECORDS] * 900, "n": [5] * 3600}
  parquet.write_table(pyarrow.table(columns), path)
  assert text_records.read(path) == FOUND * 900
  assert "row 1: 'n' is 5, no text" in refusal(path, "n")
  assert "has no field 'body'" in refusal(path, "body")
  data = path.read_bytes()
  for damaged in (data[:-9], data[9:], b"PAR1" * 4):
    path.write_bytes(damaged)
    assert "is no readable Parquet file" in refusal(path)
  packed = {"text": ["a" * 1000] * 100_000}
  parquet.write_table(pyarrow.table(packed), path, compression="gzip")
  assert "--most_unpacked_mb" in refusal(path)
