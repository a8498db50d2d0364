"""Rows of many cases on meshes: a group is compiled before it is timed."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

from models.errors import InputError, reason
from research.bench import mesh_losses, meshes
from research.bench.mesh_cases import Case

# Cases that are compiled at a time, each by several threads.
_COMPILERS = 8

Row = dict[str, Any]


def rows(
  cases: Sequence[Case],
  *,
  dtype: str,
  attention: str | None,
  seconds: float,
  updates: int,
  left: Callable[[], float],
  begin: Callable[[Case], None],
) -> Iterator[tuple[Case, Row | None]]:
  """Measures cases one by one, those of a group side by side.

  Args:
    cases: what is measured.
    dtype: of activations.
    attention: implementation, or None.
    seconds: of a measurement.
    updates: of cases that compare losses.
    left: seconds until which a case may begin.
    begin: called with each case before it runs.

  Yields:
    Each case and its row; None where no time was left. The row of a case that
    failed says why.

  Raises:
    InputError: a mesh does not do.
  """
  how = {"dtype": dtype, "attention": attention}
  for _, group in itertools.groupby(cases, lambda case: case.group):
    members = list(group)
    ready = _compiled(members, how, left)
    for case in members:
      compares = case.kind == "losses"
      if left() <= 0 or not (compares or case.text in ready):
        yield case, None
        continue
      begin(case)
      if compares:
        work = lambda case=case: mesh_losses.compared(
          case, **how, updates=updates
        )
      else:
        # Taken out, because the next case needs the memory of this one.
        made = ready.pop(case.text)
        if isinstance(made, dict):
          yield case, made
          continue
        work = lambda made=made: made.row(seconds)
        del made
      row = _or_reason(case, work)
      del work
      yield case, row


def _compiled(cases, how, left) -> dict[str, meshes.Timing | Row]:
  """Compiled cases by their texts, or rows that say why one is not.

  What devices do is measured when nothing compiles beside it.
  """

  def compiled(case, timing):
    return _or_reason(case, lambda: (timing.compile(), timing)[1])

  ready = {}
  with futures.ThreadPoolExecutor(_COMPILERS) as pool:
    for case in cases:
      if case.kind != "losses" and left() > 0:
        timing = _or_reason(case, lambda case=case: meshes.Timing(case, **how))
        if not isinstance(timing, dict):
          timing = pool.submit(compiled, case, timing)
        ready[case.text] = timing
  return {
    text: each.result() if isinstance(each, futures.Future) else each
    for text, each in ready.items()
  }


def _or_reason(case: Case, function: Callable[[], Any]) -> Any:
  """What `function()` gives, or a row that says why it failed."""
  try:
    return function()
  except InputError:
    raise
  except Exception as error:
    return {
      "group": case.group,
      "kind": case.kind,
      "model": case.name,
      "case": case.text,
      "failed": reason(error),
    }
