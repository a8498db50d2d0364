"""The README says what is so: its snippets run, and its lists are whole."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_prints_what_its_comments_say(number):
  code = SNIPPETS[number]
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(code, f"README.md snippet {number}", "exec"), {})
  said = re.findall(r"^# (.*)$", code, re.MULTILINE)
  assert printed.getvalue().splitlines() == said and said


def test_there_is_a_snippet():
  assert any("from ops import" in snippet for snippet in SNIPPETS)


def test_the_support_table_has_every_op():
  for op, *_ in dispatch.table():
    assert re.search(rf"^\|.*`{op}`", TEXT, re.MULTILINE), op


def test_every_flagfile_is_listed():
  for path in (ROOT / "experiments/flagfiles").glob("*.flags"):
    assert f"`{path.stem}`" in TEXT, path.name


def test_links_to_pages_resolve():
  links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", TEXT)
  links = [link for link in links if not link.startswith("http")]
  assert links
  for link in links:
    assert (ROOT / link).exists(), link


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  for target in set(re.findall(r"make (\w+)", TEXT)):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
