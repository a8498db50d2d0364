"""The least time that work can take: the roofline model.

Work is a row of phases, none of which overlaps another. A phase takes at least
its floating-point operations over the rate of large matrix products, and at
least its bytes over the bandwidth of main memory (Williams, Waterman and
Patterson 2009).
"""

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Phase:
  """Work that no other work of the operation overlaps.

  Attributes:
    flops: of matrix products.
    bytes: read from or written to main memory.
    exps: exponentials, and what else goes to the same slow unit.
  """

  flops: float
  bytes: float
  exps: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """What a machine can a second; infinity where that is not known."""

  flops: float
  bytes: float
  exps: float = math.inf

  def floor(self, phases: Iterable[Phase]) -> float:
    """Seconds that `phases`, one after the other, take at least."""
    return sum(
      max(
        phase.flops / self.flops,
        phase.bytes / self.bytes,
        phase.exps / self.exps,
      )
      for phase in phases
    )
