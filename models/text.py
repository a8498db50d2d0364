"""The texts that ship with the repository, and text files of the user."""

import os
import pathlib

from models import input_files, text_records
from models.errors import InputError

_CORPORA = pathlib.Path(__file__).parents[1] / "data/corpora"
_SHIPPED = {
  "wikitext2:train": "wikitext2_train_part.txt.xz",
  "wikitext2:valid": "wikitext2_valid.txt.xz",
  "wikitext2:test": "wikitext2_test.raw.txt.xz",
  "gutenberg:slice": "gutenberg_slice.txt.xz",
}
_PLAIN = (".txt", ".md")
_FORMS = (
  ".txt, .md, .jsonl or .parquet file; all but the last also as .gz or .xz"
)


def text_path(name: str | os.PathLike[str]) -> pathlib.Path:
  """The file of a text of `load_text`.

  Raises:
    InputError: there is no such text.
  """
  name = os.fspath(name)
  path = pathlib.Path(name).expanduser()
  if name in _SHIPPED:
    path = _CORPORA / _SHIPPED[name]
  if not path.is_file():
    raise InputError(
      f"{path}: no such text; give {', '.join(_SHIPPED)}, or the path of a "
      f"{_FORMS}"
    )
  named = path.suffix in (".gz", ".xz", *_PLAIN) or text_records.holds(path)
  if not named:
    raise InputError(f"{path}: is not named as a {_FORMS}: convert it")
  text_records.check_readable(path)
  return path


def load_text(
  name: str | os.PathLike[str], field: str = text_records.FIELD
) -> str:
  """Reads a whole text; records are parted by an empty line.

  WikiText-2's valid part has `<unk>` in the place of rare words, its train
  and test parts have not; nothing is done about it here. See
  `data/corpora/README.md`.

  Args:
    name: "wikitext2:train", "wikitext2:valid", "wikitext2:test",
      "gutenberg:slice", or the path of a .txt or .md file in UTF-8, whose mark
      at the beginning is left out, of a .jsonl file (each also .gz or .xz), or
      of a .parquet file.
    field: of the records of a .jsonl or .parquet file.

  Raises:
    InputError: there is no such text, or it cannot be read.
  """
  return "\n\n".join(load_parts(name, field)[0])


def load_parts(
  name: str | os.PathLike[str], field: str = text_records.FIELD
) -> tuple[list[str], bool]:
  """The texts of a file's records, or its whole text; whether they are records.

  Args:
    name: as for `load_text`.
    field: of records.

  Raises:
    InputError: there is no such text, or it cannot be read.
  """
  path = text_path(name)
  packed = path.suffix in (".gz", ".xz")
  if packed and not input_files.is_packed(path):
    raise InputError(
      f"{path}: cannot be read as its name says, since it is not packed: get "
      "the file again, or rename it"
    )
  if text_records.holds(path):
    return text_records.read(path, field), True
  return [input_files.read_text(path)], False
