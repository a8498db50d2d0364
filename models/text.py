"""The texts that ship with the repository, and text files of the user."""

import os
import pathlib

from models import input_files
from models.errors import InputError

_CORPORA = pathlib.Path(__file__).parents[1] / "data/corpora"
_SHIPPED = {
  "wikitext2:train": "wikitext2_train_part.txt.xz",
  "wikitext2:valid": "wikitext2_valid.txt.xz",
  "wikitext2:test": "wikitext2_test.raw.txt.xz",
  "gutenberg:slice": "gutenberg_slice.txt.xz",
}
_SUFFIXES = (".xz", ".gz", ".txt")


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
      ".txt, .txt.xz or .txt.gz file"
    )
  if path.suffix not in _SUFFIXES:
    raise InputError(
      f"{path}: is not named .txt, .txt.xz or .txt.gz: rename or convert it"
    )
  return path


def load_text(name: str | os.PathLike[str]) -> str:
  """Reads a whole text.

  WikiText-2's valid part has `<unk>` in the place of rare words, its train
  and test parts have not; nothing is done about it here. See
  `data/corpora/README.md`.

  Args:
    name: "wikitext2:train", "wikitext2:valid", "wikitext2:test",
      "gutenberg:slice", or the path of a .txt, .txt.xz or .txt.gz file in
      UTF-8, whose mark at the beginning is left out.

  Raises:
    InputError: there is no such text, or it cannot be read.
  """
  path = text_path(name)
  if path.suffix != ".txt" and not input_files.is_packed(path):
    raise InputError(
      f"{path}: cannot be read as its name says, since it is not packed: get "
      "the file again, or rename it"
    )
  return input_files.read_text(path)
