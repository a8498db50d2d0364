"""Texts of JAX programs: with sizes as words, and other ones of one meaning.

The programs are those that `research.program_metrics` writes, with or without
the types of each line's arrays as comments. Nothing is run.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from models.errors import InputError

# As jaxprs write types.
SHORT = {
  "float32": "f32",
  "bfloat16": "bf16",
  "float16": "f16",
  "int32": "i32",
  "int8": "i8",
}
_FORM = re.compile(
  r"(?P<head>(?:import .*\n)*\n)"
  r"inputs = \{\n(?P<inputs>(?:  .*\n)+)\}\n\n\n"
  r"def (?P<function>f|loss)\(.*\):\n"
  r"(?P<body>(?:  .*\n)*?)(?P<result>  return .*\n)"
  r"(?P<gradient>\n\ndef f\(.*\):\n  return jax\.grad\(loss, .*\n)?"
)
_INPUT = re.compile(r'  "(\w+)": \(\((.*?),?\), "(\w+)"(?:, (\d+))?\),')
_NAME = re.compile(r"\b(?:[ax]|step)\d+\b")
# What a statement may read or bind: also what `attention` masks with.
_BOUND = re.compile(r"\b(?:[ax]\d+|step\d+|mask)\b")
_WRITTEN = re.compile(r"^ *(?:def (\w+)|([\w, ]+) = )", re.MULTILINE)
_TYPE = re.compile(r"(\w+) (\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Program:
  """The parts of a program's text.

  Attributes:
    head: imports.
    inputs: argument -> its line, in order.
    statements: of the function, each with its lines and its indented body.
    result: the line that returns.
    is_gradient: whether `f` is the gradient of that function.
  """

  head: str
  inputs: Mapping[str, str]
  statements: Sequence[str]
  result: str
  is_gradient: bool

  @classmethod
  def parse(cls, text: str) -> Self:
    """Takes a program apart.

    Raises:
      InputError: the text is no such program.
    """
    found = _FORM.fullmatch(text)
    if not found or (found["function"] == "loss") != bool(found["gradient"]):
      raise InputError(
        "a text is no program as make_program_metrics.py writes them: take "
        "another --text_column, and --text_copies=1"
      )
    lines = found["inputs"].splitlines(keepends=True)
    return cls(
      head=found["head"],
      inputs={_INPUT.match(line)[1]: line for line in lines},
      statements=re.findall(r"  \S.*\n(?:   .*\n)*", found["body"]),
      result=found["result"],
      is_gradient=bool(found["gradient"]),
    )

  def write(self) -> str:
    """The text; of `parse` the one that was parsed."""
    names = ", ".join(self.inputs)
    text = (
      f"{self.head}inputs = {{\n{''.join(self.inputs.values())}}}\n\n\n"
      f"def {'loss' if self.is_gradient else 'f'}({names}):\n"
      f"{''.join(self.statements)}{self.result}"
    )
    if not self.is_gradient:
      return text
    floats = [i for i, v in enumerate(self.inputs.values()) if "float" in v]
    where = tuple(floats) if len(floats) > 1 else floats[0]
    return (
      f"{text}\n\ndef f({names}):\n"
      f"  return jax.grad(loss, argnums={where})({names})\n"
    )

  def arranged(self, order: Sequence[int]) -> Self:
    """The same with its statements in another order."""
    return dataclasses.replace(
      self, statements=[self.statements[i] for i in order]
    )

  def renamed(self, names: Mapping[str, str]) -> Self:
    """The same with other names, and inputs in the order of `names`."""
    change = lambda text: _NAME.sub(lambda m: names.get(m[0], m[0]), text)
    return dataclasses.replace(
      self,
      inputs={
        new: change(self.inputs[old])
        for old, new in names.items()
        if old in self.inputs
      },
      statements=[change(part) for part in self.statements],
      result=change(self.result),
    )

  @functools.cached_property
  def needs(self) -> list[set[int]]:
    """For each statement, the earlier ones that must stand before it.

    Those that bind what it reads or binds, and those that read what it binds.
    A function reads what its body does where it is called, too.
    """
    inner: dict[str, set[str]] = {}
    seen: list[tuple[set[str], set[str]]] = []
    found = []
    for text in self.statements:
      code = re.sub("#.*", "", text)
      writes = {
        name
        for function, bound in _WRITTEN.findall(code)
        for name in _BOUND.findall(function or bound)
      }
      reads = {*_BOUND.findall(code)} - writes
      reads |= {more for name in reads for more in inner.get(name, ())}
      if code.startswith("  def "):
        inner |= dict.fromkeys(writes, reads)
      both = reads | writes
      found.append(
        {
          i
          for i, (others_read, others_write) in enumerate(seen)
          if others_write & both or others_read & writes
        }
      )
      seen.append((reads, writes))
    return found


def other_forms(text: str, count: int, seed: int = 0) -> list[str]:
  """Programs that compute the same from the same inputs, in other words.

  Statements stand in another order that gives every name the same value.
  Every second form has the names `a1`, `x1` and so on exchanged at random, and
  its inputs in a random order; the others number both as they appear, as the
  grammar does. What is returned keeps its order, but a gradient goes by the
  inputs. Comments move with their lines.

  Args:
    text: a program, with comments or without.
    count: of forms; two may be the same where little can be exchanged.
    seed: of the choices, which are others for every text.

  Raises:
    InputError: the text is no such program.
  """
  program = Program.parse(text)
  return [form(program, number, seed)[0].write() for number in range(count)]


def form(
  program: Program, number: int, seed: int = 0
) -> tuple[Program, dict[str, str]]:
  """One of `other_forms`, and the new names of its names."""
  key = zlib.crc32("".join(program.statements).encode())
  rng = np.random.default_rng((seed, 41, number, key))
  found = program.arranged(_order(program.needs, rng))
  appear = dict.fromkeys(_NAME.findall("".join(found.statements)))
  inputs = [name for name in appear if name in program.inputs]
  inputs += [name for name in program.inputs if name not in appear]
  arrays = [name for name in appear if name.startswith("x")]
  pairs = {}
  for names in (inputs, arrays):
    new = sorted(names, key=lambda name: int(name[1:]))
    if number % 2 == 0:
      names = [names[i] for i in rng.permutation(len(names))]
      new = [new[i] for i in rng.permutation(len(new))]
    pairs |= zip(names, new)
  for place, text in enumerate(found.statements):
    if text.startswith("  def step"):
      pairs[_NAME.search(text)[0]] = f"step{place}"
  return found.renamed(pairs), pairs


def _order(needs: Sequence[set[int]], rng: np.random.Generator) -> list[int]:
  """A random order in which everything stands behind what it needs."""
  left, order, done = list(range(len(needs))), [], set()
  while left:
    ready = [i for i in left if needs[i] <= done]
    chosen = ready[int(rng.random() * len(ready))]
    left.remove(chosen)
    order.append(chosen)
    done.add(chosen)
  return order


def sized(text: str) -> str:
  """A program with comments, short, and with logarithms of sizes as words.

  A line for each input, `gradient` where the gradient is computed, then the
  statements, all without imports and headings. Behind the type of an array,
  such as f32[136,256], stand the binary logarithms of its axes and, of more
  than one, of its elements, rounded to a tenth: "Hb Ia Pb". A word has a letter
  for the whole part (A is 0) and one for the tenths (a is 0): tokenizers split
  digits, but learn such words as one token. Where a line reads an array that
  another line made, the logarithms stand without the type.

  Args:
    text: in the form of the column `typed`.

  Raises:
    InputError: the text is no such program.
  """
  program = Program.parse(text)
  lines = [_sized_input(line) for line in program.inputs.values()]
  if program.is_gradient:
    lines.append("gradient")
  for statement in program.statements:
    lines += [_sized_line(line) for line in statement.splitlines()]
  lines.append(program.result.rstrip("\n"))
  return "\n".join(line.removeprefix("  ") for line in lines) + "\n"


def _sized_input(line: str) -> str:
  name, shape, dtype, bound = _INPUT.match(line).groups()
  shape = shape.replace(" ", "")
  found = f"{name} {SHORT[dtype]}[{shape}] {logarithms(shape)}"
  return f"{found} below {bound}" if bound else found


def _sized_line(line: str) -> str:
  code, _, comment = line.partition("  # ")
  if not comment:
    return line
  written = {*_NAME.findall(code.partition(" = ")[0])}
  notes = [
    f"{name} {dtype}[{shape}] {logarithms(shape)}"
    if name in written
    else f"{name} {logarithms(shape)}"
    for name, dtype, shape in _TYPE.findall(comment)
  ]
  return f"{code} # {' '.join(notes)}"


@functools.lru_cache(maxsize=1 << 16)
def logarithms(shape: str) -> str:
  """Words for a shape such as "136,256": each axis, then all elements."""
  axes = [int(size) for size in shape.split(",") if size]
  sizes = axes if len(axes) == 1 else [*axes, math.prod(axes)]
  return " ".join(map(_word, sizes))


def _word(size: int) -> str:
  whole, tenths = divmod(round(10 * math.log2(max(size, 1))), 10)
  # Beyond 2^26, which is rare, a Z stands in front.
  return "Z" * (whole // 26) + chr(ord("A") + whole % 26) + "abcdefghij"[tenths]
