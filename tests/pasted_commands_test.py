"""Commands of README and of docs/ can be pasted: each is checked, or runs.

Above a block of commands stands what is done with it here:

    <!-- commands: run FLAGS -->   it runs in an empty folder, behind the blocks
                                   of its page before; FLAGS make it small
    <!-- commands: run by FILE --> that test pastes and runs it
    <!-- commands: need WHAT -->   a GPU, data, or minutes: flags are parsed

and `<!-- all commands: need WHAT -->` says it for a page. There is no list of
what is left out: a block without a line of these fails, and so does a line that
is no command that is known here. What a command prints stands in blocks of
`text`.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.readme_test import MAKEFILE, PAGES, ROOT

_BLOCK = re.compile(
  r"(?:^ *<!-- commands: (?P<how>[^\n]*?) -->\n+)?"
  r"^(?P<indent> *)```\n(?P<body>.*?)^ *```$",
  re.DOTALL | re.MULTILINE,
)
_ALL = re.compile(r"^<!-- all commands: need (.+) -->$", re.MULTILINE)
# Tools that any shell has.
_SHELL = ("awk", "xzcat")
# Their flags are parsed by `readme_test`.
_SCRIPT = re.compile(r"experiments/\w+\.py$")


def parse(page):
  """Blocks of commands: what is done with them, and their lines."""
  text = PAGES[page]
  # Code of other languages goes, so that no closing fence looks like an
  # opening one.
  text = re.sub(r"^( *)```\w+\n.*?^ *```$", "", text, flags=re.DOTALL | re.M)
  for found in _BLOCK.finditer(text):
    body = found["body"].replace("\\\n", " ")
    lines = [line.strip() for line in body.splitlines()]
    yield found["how"], [line for line in lines if line]


def known(line):
  """Whether a line is a command that is understood; checks what it names."""
  words = shlex.split(line, comments=True)
  while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
    words.pop(0)
  if not words:
    return False
  program, *rest = words
  if program == "python" and rest and rest[0] == "-m":
    return importlib.util.find_spec(rest[1]) is not None
  if program in ("python", ".venv/bin/python"):
    return bool(rest) and (ROOT / rest[0]).is_file() and _has_flags(rest)
  if program == "make":
    return all(
      "=" in word or re.search(rf"^{word}:", MAKEFILE, re.MULTILINE)
      for word in rest
    )
  if program.startswith("launch/"):
    return os.access(ROOT / program, os.X_OK)
  return program in _SHELL


def _has_flags(words):
  """Whether all words behind a script are flags; absl parses them elsewhere."""
  is_script = _SCRIPT.match(words[0]) is not None
  return not is_script or all(word.startswith("--") for word in words[1:])


COMMANDS = {page: blocks for page in PAGES if (blocks := list(parse(page)))}
RUN = {
  page: [how for how, _ in blocks if how and re.match(r"run(?! by)", how)]
  for page, blocks in COMMANDS.items()
}


@pytest.mark.parametrize("page", COMMANDS)
def test_every_block_says_how_it_is_tested(page):
  everything = _ALL.search(PAGES[page])
  for how, lines in COMMANDS[page]:
    assert how or everything, f"{page}: say `<!-- commands: ... -->`: {lines}"
    kind = re.fullmatch(r"need \S.*|run by (\S+)|run( --\S+)*", how or "need x")
    assert kind, f"{page}: {how}"
    if kind[1]:
      test = (ROOT / kind[1]).read_text(encoding="utf-8")
      scripts = re.findall(r"experiments/(\w+)\.py", "\n".join(lines))
      assert page in test and all(name in test for name in scripts), kind[1]


@pytest.mark.parametrize("page", COMMANDS)
def test_every_line_is_a_command(page):
  for _, lines in COMMANDS[page]:
    for line in lines:
      assert known(line), f"{page}: {line}"


@pytest.mark.parametrize("page", [page for page, how in RUN.items() if how])
def test_commands_run(page, tmp_path):
  for name in ("data", "experiments", "tests", "launch"):
    (tmp_path / name).symlink_to(ROOT / name)
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  for how, lines in COMMANDS[page]:
    if how not in RUN[page]:
      continue
    for line in lines:
      more = ""
      if line.startswith("python "):
        line = shlex.quote(sys.executable) + line.removeprefix("python")
        more = how.removeprefix("run")
      done = subprocess.run(
        f"{line}{more}", shell=True, cwd=tmp_path, env=env, text=True,
        capture_output=True,
      )  # fmt: skip
      assert done.returncode == 0, f"{page}: {line}\n{done.stderr}"


def test_readme_runs_something():
  assert RUN["README.md"]


@pytest.mark.parametrize(
  "line",
  [
    "error: a line of output",
    "python experiments/none.py",
    "python experiments/train_lm.py steps",
    "python -m tests.none",
    "make none",
    "launch/none.sh",
    "A=b",
  ],
)
def test_what_is_no_command_is_seen(line):
  assert not known(line)
