import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest

from models.errors import InputError
from research.evaluation import task_data

RECORDS = [{"text": "naïve “one”"}, {"text": "two\u2028three"}]
JSON = json.dumps(RECORDS, ensure_ascii=False)
JSONL = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS)


@pytest.mark.parametrize("kind, text", [(".json", JSON), (".jsonl", JSONL)])
@pytest.mark.parametrize(
  "ending, pack",
  [
    ("", bytes),
    (".gz", gzip.compress),
    (".xz", lzma.compress),
    (".bz2", bz2.compress),
  ],
)
def test_all_forms_give_the_same_records(tmp_path, kind, text, ending, pack):
  path = tmp_path / f"x.test{kind}{ending}"
  path.write_bytes(pack(text.encode()))
  found = task_data.read_records(tmp_path, ("other", "x.test"), "task")
  assert found == (path, RECORDS)


CSV = 'question,choice0,choice1,choice2,choice3,answer\n"a, b\nc",1,2,3,4,2\n'
LETTERS = "Why?,1,2,3,4,D\n"


def _archive(path):
  with tarfile.open(path, "w:xz") as archive:
    for name, text in (
      ("mmlu/test/us_history_test.csv", LETTERS),
      ("mmlu/test/anatomy_test.csv", CSV),
      ("mmlu/dev/anatomy_dev.csv", LETTERS),
    ):
      member = tarfile.TarInfo(name)
      member.size = len(text)
      archive.addfile(member, io.BytesIO(text.encode()))


def test_subjects_are_read_from_a_folder_or_an_archive(tmp_path):
  expected = [
    ("anatomy", "a, b\nc", ["1", "2", "3", "4"], "2"),
    ("us_history", "Why?", ["1", "2", "3", "4"], "D"),
  ]
  path = tmp_path / "mmlu_dev_test.tar.xz"
  _archive(path)
  found = task_data.read_records(tmp_path, ("mmlu/test",), "mmlu")
  assert found[0] == path
  assert [tuple(record.values()) for record in found[1]] == expected
  assert len(task_data.read_records(tmp_path, ("mmlu/dev",), "mmlu")[1]) == 1
  (tmp_path / "mmlu/test").mkdir(parents=True)
  (tmp_path / "mmlu/test/anatomy_test.csv").write_text(CSV)
  path, records = task_data.read_records(tmp_path, ("mmlu/test",), "mmlu")
  assert path.is_dir()
  assert [tuple(record.values()) for record in records] == expected[:1]


def test_missing_and_damaged_files_are_named(tmp_path):
  with pytest.raises(InputError, match="no such folder"):
    task_data.read_records(tmp_path / "none", ("x",), "piqa")
  with pytest.raises(InputError, match="piqa: put x"):
    task_data.read_records(tmp_path, ("x", "y"), "piqa")
  whole = gzip.compress(JSON.encode())
  for name, content in (
    ("x.json", b"{"),
    ("x.json", b"[1, 2]"),
    ("x.json", "[ü]".encode("latin-1")),
    ("x.json.gz", whole[:-9]),
    ("x.json.xz", b"nothing"),
  ):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
      task_data.read_records(tmp_path, ("x",), "piqa")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
  (tmp_path / "mmlu.tar.xz").write_bytes(b"nothing")
  with pytest.raises(InputError, match="mmlu.tar.xz"):
    task_data.read_records(tmp_path, ("mmlu/test",), "mmlu")
