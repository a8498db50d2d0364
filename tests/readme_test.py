"""README and the pages of docs/ say what is so.

Their snippets run, their links lead somewhere, their commands parse, and their
lists are whole.
"""

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from absl import flags

from ops import dispatch
from tests.experiments import scripts

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
  str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
  for path in [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "data").rglob("*.md")),
  ]
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SYSTEMS = re.findall(r"^define DEMO_(\w+)$", MAKEFILE, re.MULTILINE)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def blocks(page, language):
  """The fenced blocks of a page, without the indentation of their list."""
  return [
    re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
    for indent, said, body in FENCE.findall(PAGES[page])
    if said == language
  ]


def demo(**variables):
  """What `make demo` runs, by make itself."""
  given = [f"{name}={value}" for name, value in variables.items()]
  return subprocess.run(
    ["make", "-n", "demo", *given], cwd=ROOT, capture_output=True, text=True
  ).stdout


def commands():
  """Every `python experiments/...` of pages and demos, and where it stands."""
  texts = [(page, body) for page in PAGES for body in blocks(page, "")]
  texts += [("Makefile", demo(SYSTEM=system)) for system in SYSTEMS]
  for page, text in texts:
    for line in text.replace("\\\n", " ").splitlines():
      if "python" not in line or " experiments/" not in line:
        continue
      words = shlex.split(line, comments=True)
      for place, word in enumerate(words):
        if word.startswith("experiments/") and word.endswith(".py"):
          yield page, Path(word).stem, words[place + 1 :]


SNIPPETS = [
  (page, number)
  for page in PAGES
  if page != "CONTRIBUTING.md"
  for number in range(len(blocks(page, "python")))
]


@pytest.mark.parametrize(("page", "number"), SNIPPETS)
def test_a_snippet_prints_what_its_comments_say(page, number):
  code = blocks(page, "python")[number]
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(code, f"{page} snippet {number}", "exec"), {})
  said = re.findall(r"^# (.*)$", code, re.MULTILINE)
  assert printed.getvalue().splitlines() == said and said


def test_the_readme_shows_an_op_and_a_model():
  op, model = blocks("README.md", "python")
  assert "from ops import" in op and "from models" in model


@pytest.mark.parametrize("name", sorted({name for _, name, _ in commands()}))
def test_commands_of_pages_parse(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  with scripts.loaded(name):
    for page, script, arguments in commands():
      if script == name:
        rest = flags.FLAGS([name, *arguments])
        assert rest == [name], f"{page}: {arguments}"
        flags.FLAGS.unparse_flags()


def test_the_pages_have_commands():
  assert len(list(commands())) > 40


def test_a_command_that_does_not_parse_is_seen():
  with scripts.loaded("train_lm"):
    with pytest.raises(flags.Error, match="lenght"):
      flags.FLAGS(["train_lm", "--lenght=3"])


def test_the_support_table_has_every_op():
  for op, *_ in dispatch.table():
    assert re.search(rf"^\|.*`{op}`", PAGES["docs/ops.md"], re.M), op


def test_every_page_is_listed():
  for page in PAGES:
    if page.startswith("docs/") and page != "docs/README.md":
      assert f"({Path(page).name})" in PAGES["docs/README.md"], page
      assert f"({page})" in PAGES["README.md"], page


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_resolve(page):
  for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", PAGES[page]):
    if link.startswith("http"):
      continue
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists(), link
    if anchor:
      assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
  floors = "ops|models|research|experiments|tests|launch|data|docs"
  # A result is what a command is to write.
  apart = r"(?<![\w/.-])(?<!--result=)"
  named = re.findall(rf"{apart}((?:{floors})/[\w./-]*\w)", PAGES[page])
  for name in named:
    placeholder = Path(name).stem in ("SCRIPT", "NAME")
    assert placeholder or (ROOT / name).exists(), name


def anchors(text):
  """Names of the headings of a page, as GitHub makes them."""
  headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  return {
    re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    for heading in headings
  }


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
  for target in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", PAGES[page], re.M):
    name = "".join(target)
    assert re.search(rf"^{name}:", MAKEFILE, re.MULTILINE), name
  for variable, value in re.findall(r"make demo (\w+)=(\w+)", PAGES[page]):
    assert "experiments/" in demo(**{variable: value}), (variable, value)


def test_demos_are_listed():
  for system in SYSTEMS:
    for text in (MAKEFILE, PAGES["README.md"]):
      assert system == "sol" or f"make demo SYSTEM={system}" in text
