"""Runs the template of a chat in a process of its own, with bounds.

`models.chat` starts this file as a program, writes a request to its input and
reads the answer; it imports nothing of the project. Templates come with models,
and so from anywhere: one may loop without end, fill the memory, or leave
Jinja's sandbox. Here it finds little time, little memory, and no files to
write.
"""

import contextlib
import datetime
import json
import pathlib
import resource
import sys
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, utils


class Namespace(utils.Namespace):
  """Jinja's, without names that begin with an underscore.

  Python looks such names up by itself, and so sandboxes were left.
  """

  def __init__(*args, **values):
    """Takes the same as a dict; `self` may be a name among the values."""
    self, *args = args
    values = dict(*args, **values)
    for name in values:
      _check_name(name)
    utils.Namespace.__init__(self, values)

  def __setitem__(self, name: str, value: Any):
    """Sets a name."""
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(f"the name {name[:40]!r} is private")


class Generation(ext.Extension):
  """The block `{% generation %}`, by which trainers find an answer."""

  tags = {"generation"}

  def parse(self, parser: Any) -> nodes.Node:
    """What stands in the block is written as if the block were not there."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
    call = self.call_method("_plain")
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _plain(self, caller: Any) -> str:
    return caller()


def environment() -> sandbox.SandboxedEnvironment:
  """What `transformers` (5.24) gives to a template."""
  found = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, ext.loopcontrols],
  )

  def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)

  def tojson(
    x, ensure_ascii=False, indent=None, separators=None, sort_keys=False
  ):
    # Jinja's own writes "<" and the like as for a web page.
    return json.dumps(
      x,
      ensure_ascii=ensure_ascii,
      indent=indent,
      separators=separators,
      sort_keys=sort_keys,
    )

  found.filters["tojson"] = tojson
  found.globals |= {
    "raise_exception": raise_exception,
    "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    "namespace": Namespace,
  }
  return found


def render(request: dict[str, Any]) -> list[str]:
  """The texts of a request's chats.

  Raises:
    Exception: the template fails, or writes too much.
  """
  template = environment().from_string(request["template"])
  texts = []
  for messages in request["chats"]:
    pieces, size = [], 0
    for piece in template.generate(
      messages=messages,
      add_generation_prompt=request["begin_answer"],
      tools=None,
      documents=None,
      **request["names"],
    ):
      pieces.append(piece)
      size += len(piece)
      if size > request["characters"]:
        raise ValueError(f"it writes over {request['characters']:,} characters")
    texts.append("".join(pieces))
  return texts


def bound(seconds: int, size: int) -> None:
  """Bounds the process.

  Args:
    seconds: of CPU time.
    size: bytes of memory beside what it holds now.
  """
  statm = pathlib.Path("/proc/self/statm")
  held = 0
  if statm.exists():
    held = int(statm.read_text().split()[0]) * resource.getpagesize()
  for kind, most, beyond in (
    # The first bound ends the process by a signal of its own.
    (resource.RLIMIT_CPU, seconds, 1),
    (resource.RLIMIT_AS, held + size, 0),
    (resource.RLIMIT_FSIZE, 0, 0),
  ):
    # Systems other than Linux know some of them, and hold to fewer.
    with contextlib.suppress(ValueError, OSError):
      resource.setrlimit(kind, (most, most + beyond))


def main() -> None:
  """Answers the request on the input: {"texts": ...} or {"error": ...}."""
  request = json.load(sys.stdin)
  bound(request["seconds"], request["memory"])
  try:
    answer = {"texts": render(request)}
  except MemoryError:
    answer = {"error": f"it takes over {request['memory'] >> 20} MB"}
  except Exception as error:  # A template may fail in any way.
    answer = {"error": str(error)[:200] or type(error).__name__}
  sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
  main()
