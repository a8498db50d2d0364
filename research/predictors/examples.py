"""Examples: a text and what was measured of it."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
  """A text and what was measured of it.

  Attributes:
    x: the text.
    y: a number, or a sequence of them for several objectives; None stands for
      one that was not measured.
    task: examples of the same may stand in front of each other in training
      with prompts.
  """

  x: str
  y: Any = None
  task: str = ""


def text_of(x: Any) -> Any:
  """The text of a str, of an `Example`, or of anything with an `x`."""
  return x if isinstance(x, str) else getattr(x, "x", x)
