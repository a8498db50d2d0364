"""Sizes that can be counted in a program's text, for a peer without text.

What anyone would count first: bytes of all arrays, elements by operator, how
often an operator stands there, how many inputs and lines, and whether the
program is a gradient. Sizes are logarithms.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from research.predictors.program_text import Program

# An array of a line's comment, such as "x1 f32[16,4]".
_ARRAY = re.compile(r"\b\w+ ([a-z]+)(\d*)\[([\d,]*)\]")
_CALL = re.compile(r"\.(\w+)\(|(@)|(\b(?:if|for|while)\b)")


def of_texts(texts: Sequence[str]) -> dict[str, np.ndarray]:
  """Features of typed programs: name -> (N,) float64.

  Args:
    texts: N, in the view "typed" of `table.programs`.

  Raises:
    InputError: a text is no such program.
  """
  rows = [_of_text(text) for text in texts]
  names = sorted({name for row in rows for name in row})
  return {n: np.array([row.get(n, 0.0) for row in rows]) for n in names}


def _of_text(text: str) -> dict[str, float]:
  program = Program.parse(text)
  elements: Counter[str] = Counter()
  counts: Counter[str] = Counter()
  largest = total = 0
  for statement in program.statements:
    sizes = []
    for _, bits, shape in _ARRAY.findall(statement):
      size = math.prod(int(n) for n in shape.split(",") if n)
      sizes.append(size)
      total += size * max(int(bits or 8) // 8, 1)
    largest = max([largest, *sizes])
    code = re.sub("#.*", "", statement)
    for found in _CALL.findall(code):
      name = next(filter(None, found))
      counts[name] += 1
      elements[name] += sum(sizes)
  found = {f"elements of {n}": math.log1p(v) for n, v in elements.items()}
  found |= {f"count of {n}": float(v) for n, v in counts.items()}
  return found | {
    "bytes": math.log1p(total),
    "largest array": math.log1p(largest),
    "lines": float(len(program.statements)),
    "inputs": float(len(program.inputs)),
    "gradient": float(program.is_gradient),
  }
