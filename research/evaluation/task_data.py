"""Records of evaluation data in local files of the usual forms."""

import csv
import io
import pathlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from models import input_files
from models.errors import InputError

_ENDINGS = ("", ".gz", ".xz", ".bz2")
_KINDS = (".json", ".jsonl")
_ARCHIVES = ("mmlu_dev_test.tar.xz", "mmlu.tar.xz", "mmlu.tar.gz", "mmlu.tar")


def read_records(
  folder: pathlib.Path, names: Sequence[str], task: str
) -> tuple[pathlib.Path, list[dict[str, Any]]]:
  """Reads the records of the first of `names` that there is.

  A name stands for NAME.json (a list), NAME.jsonl (a record a line), either of
  them also compressed (.gz, .xz, .bz2). "mmlu/test" stands also for a folder
  with a file a subject, SUBJECT_test.csv (question, four choices, answer) or
  SUBJECT_test.jsonl, or for the former inside of mmlu_dev_test.tar.xz or
  mmlu.tar[.xz|.gz].

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
  kinds = "" if names[0].startswith("mmlu/") else ".json or .jsonl"
  others = f", or one of {', '.join(names[1:])}" if names[1:] else ""
  raise InputError(
    f"--data={folder}: has no file for {task}: put {names[0]}{kinds} there"
    f"{others}"
  )


def _candidates(
  folder: pathlib.Path, name: str
) -> Iterator[tuple[pathlib.Path, Callable[[pathlib.Path], list[dict]]]]:
  if name.startswith("mmlu/"):
    yield folder / name, _read_folder
    for archive in _ARCHIVES:
      yield folder / archive, lambda path: _read_archive(path, name)
  for kind in _KINDS:
    for ending in _ENDINGS:
      yield folder / f"{name}{kind}{ending}", _read_json


def _guarded(
  path: pathlib.Path, read: Callable[[pathlib.Path], list[dict]]
) -> list[dict[str, Any]]:
  with input_files.errors_at(path, wrong="cannot be read"):
    records = read(path)
  if not all(isinstance(record, dict) for record in records):
    raise InputError(f"{path}: is no list of records: get the file again")
  return records


def _read_json(path: pathlib.Path) -> list[dict[str, Any]]:
  text = input_files.read_text(path)
  if ".jsonl" in path.suffixes:
    return [
      input_files.parse_json(line, f"{path} line {number}", object)
      for number, line in enumerate(text.split("\n"), 1)
      if line.strip()
    ]
  records = input_files.parse_json(text, path, object)
  return records if isinstance(records, list) else [records]


def _read_folder(path: pathlib.Path) -> list[dict[str, Any]]:
  records = []
  for file in sorted(path.glob("*.csv")):
    records += _read_csv(file.stem, input_files.read_text(file))
  for file in sorted(path.glob("*.jsonl")):
    subject = file.stem.rpartition("_")[0] or file.stem
    for record in _read_json(file):
      named = isinstance(record, dict) and "subject" not in record
      records.append(record | {"subject": subject} if named else record)
  return records


def _read_archive(path: pathlib.Path, name: str) -> list[dict[str, Any]]:
  records = []
  data = input_files.read_bytes(path)
  with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
    members = {
      member.name: member
      for member in archive.getmembers()
      # Files with holes say how large they are, without as many bytes.
      if member.isfile()
      and not member.issparse()
      and member.name.endswith(".csv")
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
