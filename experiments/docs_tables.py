"""Fills the tables of README.md and docs/ from result files.

  python experiments/docs_tables.py          # writes
  python experiments/docs_tables.py --check  # exits with 1 where out of date

A page marks where the table of a result file stands, and where the first
comments of scripts and flagfiles do: `research/results/tables.py` says how, and
`first_comments.py` beside it. Takes seconds.
"""

import pathlib
import sys

from absl import flags

import cli
from models.errors import InputError
from research.core import files
from research.results import tables

_ROOT = flags.DEFINE_string("root", ".", "the folder of README.md and docs/")
_CHECK = flags.DEFINE_bool("check", False, "write nothing, only compare")


def main(_) -> None:
  """Fills or compares; see the module's docstring."""
  root = pathlib.Path(_ROOT.value)
  pages = [root / "README.md", *sorted(root.glob("docs/**/*.md"))]
  if not pages[0].is_file():
    raise InputError(f"{pages[0]}: no such file: give --root")
  changed = {
    page: new
    for page in pages
    if (new := tables.fill(page)) != page.read_text(encoding="utf-8")
  }
  if _CHECK.value and changed:
    names = ", ".join(map(str, changed))
    sys.exit(f"{names}: out of date: run experiments/docs_tables.py")
  for page, text in changed.items():
    files.write_text(page, text)
  print(f"{len(pages)} pages, of which {len(changed)} changed")


if __name__ == "__main__":
  cli.run(main)
