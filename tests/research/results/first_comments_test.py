"""Scripts and flagfiles as sections of a page."""

import pytest

from research.results import first_comments

SCRIPT = '''"""Trains x. Slowly.

  python experiments/x.py \\
    --steps=3   # three

Two minutes. With `--steps=1` less.
"""
'''
FLAGS = """# Settings of
# one run.
#   python experiments/x.py \\
#     --flagfile=a.flags
# Seconds.
--steps=3
# No more of it.
"""


@pytest.fixture
def home(tmp_path):
  """Two scripts of which one is shared by others, a flagfile, and a page."""
  (tmp_path / "x.py").write_text(SCRIPT + 'if __name__ == "__main__":\n  0\n')
  (tmp_path / "shared.py").write_text(SCRIPT)
  (tmp_path / "a.flags").write_text(FLAGS)
  (tmp_path / "docs").mkdir()
  return tmp_path


def test_a_comment_is_what_a_file_begins_with(home):
  found = first_comments.first_comment(home / "a.flags")
  assert found.startswith("Settings of\none run.\n  python ")
  assert found.endswith("Seconds.")
  assert first_comments.first_comment(home / "x.py").startswith("Trains x.")


def test_scripts_that_run_have_an_entry_and_a_section(home):
  page = "a\n<!-- comments: ../*.py -->\nold\n<!-- end -->\nb\n"
  found = first_comments.fill(page, home / "docs")
  assert found == (
    "a\n<!-- comments: ../*.py -->\n- [`x.py`](#xpy): Trains x.\n\n"
    "### `x.py`\n\nTrains x. Slowly.\n\n"
    "```\npython experiments/x.py \\\n  --steps=3   # three\n```\n\n"
    "Two minutes. With `--steps=1` less.\n\n<!-- end -->\nb\n"
  )
  assert first_comments.fill(found, home / "docs") == found


def test_flagfiles_keep_the_lines_of_their_commands(home):
  page = "<!-- comments: ../*.flags -->\n<!-- end -->\n"
  found = first_comments.fill(page, home / "docs")
  assert "- [`a.flags`](#aflags): Settings of one run.\n" in found
  command = "python experiments/x.py \\\n  --flagfile=a.flags"
  assert f"Settings of\none run.\n\n```\n{command}\n```\n\nSeconds.\n" in found
  assert "No more" not in found
