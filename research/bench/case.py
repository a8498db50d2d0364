"""What a suite of benchmarks lists: cases, and the calls that do their work."""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from research.cost.roofline import Ceilings, Phase

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """A computation, ready to be timed.

  Attributes:
    start: starts it, given what `inputs` drew.
    wait: waits for what `start` returned, and for all that was started before.
    count: passes, steps or updates of one call; times are of one of them.
    inputs: draws fresh arguments for every call, outside of its time. Without
      it calls that do not wait for each other may be in flight at once.
    columns: of the row, from what `start` returned after all was timed.
  """

  start: Callable[..., Any]
  wait: Callable[[Any], Any] = jax.block_until_ready
  count: int = 1
  inputs: Callable[[], tuple] | None = None
  columns: Callable[[Any], Row] = lambda output: {}

  def run(self) -> Any:
    """Makes one call, and returns its output."""
    output = self.start(*(self.inputs() if self.inputs else ()))
    self.wait(output)
    return output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """A time that was taken elsewhere, such as in another process.

  Attributes:
    seconds: of one pass, step or update.
    columns: of the row.
  """

  seconds: float
  columns: Row = dataclasses.field(default_factory=dict)


Build = Callable[[], Call | Measured]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
  """Another program that does the work of a case.

  Attributes:
    name: of the program.
    missing: says in one line why it is not here, or None.
    ways: to run it, each named by a detail or None; the fastest counts.
  """

  name: str
  missing: Callable[[], str | None] = lambda: None
  ways: Mapping[str | None, Build]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One piece of work, and who does it.

  Attributes:
    op: what is done.
    shape: for people.
    dtype: of activations; floors are those of its products.
    which: the pass: "fwd", "bwd" or "fwd+bwd".
    phases: the least work, of one pass, step or update.
    ours: implementations by name; each is built on demand, and may raise
      `ops.dispatch.UnsupportedError`.
    peers: those that can do it.
    model: its name, or None for an op alone.
    amounts: what one pass handles, such as {"tokens": 64}: rates come of it.
    columns: more of every row.
    precision: of float32 products, or None for jax's.
    ceilings: of the device, where the suite has measured them.
    seconds: of a row's measurements, in place of the plan's.
  """

  op: str
  shape: str
  dtype: str
  which: str
  phases: Sequence[Phase]
  ours: Mapping[str, Callable[[], Call]]
  peers: Sequence[Peer] = ()
  model: str | None = None
  amounts: Mapping[str, float] = dataclasses.field(default_factory=dict)
  columns: Row = dataclasses.field(default_factory=dict)
  precision: str | None = None
  ceilings: Ceilings | None = None
  seconds: float | None = None


class SuiteOfCases(abc.ABC):
  """What every suite is: a frozen dataclass of options that lists cases."""

  @abc.abstractmethod
  def cases(self, plan: Any, note: Say) -> Iterator[Case]:
    """Checks the options, and then yields cases as they are asked for.

    Args:
      plan: the `research.bench.plan.Plan` that the cases are for.
      note: takes a line that says what was left out.

    Raises:
      InputError: an option or a name of the plan does not exist here.
    """

  def closing(self, rows: Sequence[Row]) -> Iterable[str]:
    """Lines for the end."""
    del rows
    return ()
