"""What scripts and flagfiles say of themselves, as sections of a page.

They stand in a page between the lines `<!-- comments: GLOB -->` and
`<!-- end -->`, GLOB relative to the page: a list of first sentences, and then a
section for each file, with the docstring of a script or the first comment of a
flagfile.
"""

import ast
import pathlib
import re
import textwrap

_BLOCK = re.compile(
  r"(<!-- comments: (\S+) -->\n)((?:(?!<!-- ).)*)(<!-- end -->)", re.DOTALL
)
_MAIN = 'if __name__ == "__main__":'


def fill(text: str, folder: pathlib.Path) -> str:
  """Returns a page with its sections of comments written anew.

  Args:
    text: of the page, in Markdown.
    folder: of the page.
  """

  def block(found: re.Match) -> str:
    files = sorted(folder.glob(found[2]))
    files = [path for path in files if _runs(path)]
    listed = "".join(map(_entry, files))
    return f"{found[1]}{listed}\n{''.join(map(_section, files))}{found[4]}"

  return _BLOCK.sub(block, text)


def first_comment(path: pathlib.Path) -> str:
  """The docstring of a Python file, or the comment that another begins with."""
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".py":
    return ast.get_docstring(ast.parse(text)) or ""
  lines = re.match(r"(?:#.*\n)*", text)[0].splitlines()
  return "\n".join(line[1:].removeprefix(" ") for line in lines)


def _runs(path: pathlib.Path) -> bool:
  """Whether a user names this file in a command."""
  return path.suffix != ".py" or _MAIN in path.read_text(encoding="utf-8")


def _entry(path: pathlib.Path) -> str:
  """A line of the list: the first sentence, and a link to the section."""
  sentence = re.match(r".*?\.(?=\s|$)|.*", first_comment(path), re.DOTALL)[0]
  anchor = path.name.replace(".", "")
  return f"- [`{path.name}`](#{anchor}): {' '.join(sentence.split())}\n"


def _section(path: pathlib.Path) -> str:
  return f"### `{path.name}`\n\n{_markdown(first_comment(path))}\n\n"


def _markdown(comment: str) -> str:
  """A comment whose indented lines, which are commands, become blocks."""
  parts = re.split(r"((?:^(?:  .*)?\n?)*^  .+\n?)", comment, flags=re.MULTILINE)
  return "\n\n".join(
    f"```\n{_broken(textwrap.dedent(part).strip())}\n```"
    if part.lstrip("\n").startswith("  ")
    else part.strip()
    for part in parts
    if part.strip()
  )


def _broken(command: str) -> str:
  """A command on several lines again, which a docstring has joined."""
  return re.sub(r" {3,}(?=--)", " \\\\\n  ", command)
