"""Records of evaluation data in local files of the usual forms."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pathlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from models.errors import InputError

_OPENERS: dict[str, Callable] = {
  "": open,
  ".gz": gzip.open,
  ".xz": lzma.open,
  ".bz2": bz2.open,
}
_KINDS = (".json", ".jsonl")
_ARCHIVES = ("mmlu_dev_test.tar.xz", "mmlu.tar.xz", "mmlu.tar.gz", "mmlu.tar")


def read_records(
  folder: pathlib.Path, names: Sequence[str], task: str
) -> tuple[pathlib.Path, list[dict[str, Any]]]:
  """Reads the records of the first of `names` that there is.

  A name stands for NAME.json (a list), NAME.jsonl (a record a line), either of
  them also compressed (.gz, .xz, .bz2). "mmlu/test" stands for a folder with
  one SUBJECT_test.csv a subject (question, four choices, answer), or for the
  same inside of mmlu_dev_test.tar.xz or mmlu.tar[.xz|.gz].

  Args:
    folder: where to look.
    names: without endings.
    task: for messages.

  Returns:
    The file or folder, and its records.

  Raises:
    InputError: there is none, or it cannot be read; names it.
  """
  if not folder.is_dir():
    raise InputError(f"--data={folder}: there is no such folder")
  for name in names:
    for path, read in _candidates(folder, name):
      if path.exists():
        return path, _guarded(path, read)
  raise InputError(
    f"--data={folder}: has no file for {task}: put {names[0]}"
    f"{'' if '/' in names[0] else '.json or .jsonl'} there"
  )


def _candidates(
  folder: pathlib.Path, name: str
) -> Iterator[tuple[pathlib.Path, Callable[[pathlib.Path], list[dict]]]]:
  if "/" in name:
    yield folder / name, _read_folder
    for archive in _ARCHIVES:
      yield folder / archive, lambda path: _read_archive(path, name)
    return
  for kind in _KINDS:
    for ending in _OPENERS:
      yield folder / f"{name}{kind}{ending}", _read_json


def _guarded(
  path: pathlib.Path, read: Callable[[pathlib.Path], list[dict]]
) -> list[dict[str, Any]]:
  try:
    records = read(path)
  except (
    OSError,
    EOFError,
    ValueError,
    lzma.LZMAError,
    tarfile.TarError,
  ) as error:
    raise InputError(
      f"{path}: cannot be read ({type(error).__name__}): get the file again"
    ) from error
  if not all(isinstance(record, dict) for record in records):
    raise InputError(f"{path}: is no list of records: get the file again")
  return records


def _read_json(path: pathlib.Path) -> list[dict[str, Any]]:
  ending = path.suffix if path.suffix in _OPENERS else ""
  with _OPENERS[ending](path, "rt", encoding="utf-8") as file:
    text = file.read()
  if ".jsonl" in path.suffixes:
    return [json.loads(line) for line in text.split("\n") if line.strip()]
  records = json.loads(text)
  return records if isinstance(records, list) else [records]


def _read_folder(path: pathlib.Path) -> list[dict[str, Any]]:
  records = []
  for file in sorted(path.glob("*.csv")):
    records += _read_csv(file.stem, file.read_text(encoding="utf-8"))
  return records


def _read_archive(path: pathlib.Path, name: str) -> list[dict[str, Any]]:
  records = []
  with tarfile.open(path) as archive:
    members = {
      member.name: member
      for member in archive.getmembers()
      if member.isfile() and member.name.endswith(".csv")
    }
    for member in sorted(members):
      if f"/{member}".rpartition("/")[0].endswith(f"/{name}"):
        text = archive.extractfile(members[member]).read().decode("utf-8")
        records += _read_csv(pathlib.PurePosixPath(member).stem, text)
  return records


def _read_csv(stem: str, text: str) -> list[dict[str, Any]]:
  rows = list(csv.reader(io.StringIO(text, newline="")))
  if rows and rows[0][0] == "question" and rows[0][-1] == "answer":
    rows = rows[1:]
  subject = stem.rpartition("_")[0]
  return [
    {
      "subject": subject,
      "question": row[0],
      "choices": row[1:-1],
      "answer": row[-1],
    }
    for row in rows
    if row
  ]
