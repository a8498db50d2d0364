"""Numbers as short sequences of tokens, and the grammar of valid ones.

`INVALID` is the token of what is no number. `MISSING` and `START` are tokens of
rows: of an objective that was not measured, and in front of all others.
"""

from models.numbers.codec import MISSING, START, TargetCodec
from models.numbers.formats import (
  INVALID,
  P10,
  Ieee,
  Normalized,
  NumberFormat,
  from_json,
)
from models.numbers.grammar import Grammar

__all__ = [
  "INVALID",
  "MISSING",
  "START",
  "Grammar",
  "Ieee",
  "Normalized",
  "NumberFormat",
  "P10",
  "TargetCodec",
  "from_json",
]
