"""The committed pages are up to date, and the script compares and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = "above\n<!-- table: {} -->\n<!-- end -->\nbelow\n"
RESULT = {"commit": "abc", "device": "cpu x1", "seconds": 1.0}
ROW = {"op": "ssd", "ms": 1.0}


def fill(folder, *arguments):
  return subprocess.run(
    [
      *(sys.executable, "experiments/docs_tables.py", f"--root={folder}"),
      *arguments,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )


@pytest.fixture
def home(tmp_path):
  """A README and a page of docs/ whose tables are not filled yet."""
  (tmp_path / "docs" / "deep").mkdir(parents=True)
  (tmp_path / "README.md").write_text(PAGE.format("speed found.json"))
  page = tmp_path / "docs" / "deep" / "page.md"
  page.write_text(PAGE.format("speed ../../found.json"))
  (tmp_path / "found.json").write_text(json.dumps(RESULT | {"rows": [ROW]}))
  return tmp_path


def test_the_committed_pages_are_up_to_date():
  done = fill(ROOT, "--check")
  assert done.returncode == 0, done.stderr


def test_check_only_compares(home):
  pages = home / "README.md", home / "docs" / "deep" / "page.md"
  before = [page.read_bytes() for page in pages]
  done = fill(home, "--check")
  assert done.returncode == 1 and "out of date" in done.stderr
  assert all(str(page) in done.stderr for page in pages)
  assert [page.read_bytes() for page in pages] == before
  assert fill(home).stdout == "2 pages, of which 2 changed\n"
  assert all("| ssd" in page.read_text() for page in pages)
  assert "(../../found.json): cpu x1" in pages[1].read_text()
  assert fill(home, "--check").returncode == 0


def test_a_mistake_is_one_line(home):
  before = (home / "README.md").read_bytes()
  (home / "docs" / "deep" / "page.md").write_text(PAGE.format("sped x.json"))
  done = fill(home)
  assert done.returncode == 2 and "valid: speed" in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert (home / "README.md").read_bytes() == before
