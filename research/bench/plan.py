"""The one way to run a benchmark: a plan makes rows of a suite's cases.

A row is a flat mapping: op, model, shape, dtype, pass, implementation; ms and
first_seconds (compilation included); rates such as tokens_per_second; floor_ms,
the least time of the work at what the device can, what binds it (`bound`), what
its bytes and products alone take, share (floor_ms / ms), `peak`, where the
rates are from, and these, `peak_tflops` and `peak_gb_per_s`; peer, peer_detail
and peer_ms of a peer that was timed in turn with it; error and error_full; and
more columns of a suite.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from ops import dispatch
from research.bench import ceilings, profiling, timing
from research.bench.case import Build, Call, Case, Measured, Peer, Row, Say
from research.cost.roofline import Ceilings

# Kernels of a profile that a row keeps.
_KERNELS = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What of a suite's cases is run, and how.

  Attributes:
    passes: of `specs.PASSES`, or none for all.
    peers: names of peers, or None for all that a suite has.
    repeats: measurements of a call at most.
    seconds: of a call's measurements, about.
    profile: name the kernels that the time of ours goes to.
    measure_ceilings: take what the device can from products, copies and reads
      in this run, not from its data sheet.
  """

  passes: Sequence[str] = ()
  peers: Sequence[str] | None = None
  repeats: int = 20
  seconds: float = 2.0
  profile: bool = False
  measure_ceilings: bool = False


def run(
  cases: Iterable[Case], plan: Plan, say: Say, note: Say
) -> Iterator[Row]:
  """Yields rows as they are timed, one an implementation and peer.

  Args:
    cases: of a suite; the next is asked for when the last is done.
    plan: which of them, and how.
    say: prints a line.
    note: takes a line that says what was left out, each once.
  """
  runner = _Runner(plan, note)
  say(_line(dict.fromkeys(_COLUMNS)))
  for case in cases:
    if not plan.passes or case.which in plan.passes:
      for row in runner.rows(case):
        say(_line(row))
        yield row


@dataclasses.dataclass(kw_only=True)
class _Entry:
  """An implementation, or a way to run a peer, and what came of timing it."""

  name: str
  made: Call | Measured
  peer: Peer | None = None
  detail: str | None = None
  seconds: float | None = None
  columns: Row = dataclasses.field(default_factory=dict)

  def title(self, case: Case) -> str:
    """Names it in a note."""
    words = [case.op, case.model, "peer" if self.peer else None, self.name]
    return " ".join(filter(None, [*words, case.which, self.detail]))


class _Runner:
  """Makes the rows of cases."""

  def __init__(self, plan: Plan, note: Say):
    self._plan, self._tell, self._noted = plan, note, set()
    self._limits: dict[str, tuple[Ceilings, str]] = {}

  def rows(self, case: Case) -> list[Row]:
    """The rows of one case: each of ours with each peer at its best."""
    precision = contextlib.nullcontext()
    if case.precision is not None:
      precision = jax.default_matmul_precision(case.precision)
    with precision:
      entries = [*self._ours(case), *self._peers(case)]
      entries = self._timed(case, entries)
      entries = [entry for entry in entries if self._finished(case, entry)]
      least = self._least(case)
    ours = [entry for entry in entries if entry.peer is None]
    best: dict[int, _Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.seconds):
      if entry.peer is not None:
        best.setdefault(id(entry.peer), entry)
    return [
      _row(case, least, own, peer)
      for own in ours or [None]
      for peer in [best[id(p)] for p in case.peers if id(p) in best] or [None]
      if own or peer
    ]

  def _ours(self, case: Case) -> Iterator[_Entry]:
    for name, build in case.ours.items():
      yield from self._built(case, build, _Entry(name=name, made=None))

  def _peers(self, case: Case) -> Iterator[_Entry]:
    asked = self._plan.peers
    for peer in case.peers:
      if not peer.ways or (asked is not None and peer.name not in asked):
        continue
      reason = peer.missing()
      if reason is not None:
        self._note(f"{case.op} peer {peer.name} is left out: {reason}")
        continue
      for detail, build in peer.ways.items():
        entry = _Entry(name=peer.name, made=None, peer=peer, detail=detail)
        yield from self._built(case, build, entry)

  def _built(self, case: Case, build: Build, entry: _Entry):
    try:
      entry.made = build()
    except dispatch.UnsupportedError as error:
      self._note(f"{entry.title(case)} is left out: {error}")
    except Exception as error:  # One that fails must not cost all other rows.
      self._failed(case, entry, error)
    else:
      yield entry

  def _timed(self, case: Case, entries: list[_Entry]) -> list[_Entry]:
    """Times them in turn; those that fail are noted and left out."""
    calls = [entry for entry in entries if isinstance(entry.made, Call)]
    found = timing.medians(
      [entry.made for entry in calls],
      repeats=self._plan.repeats,
      seconds=case.seconds or self._plan.seconds,
    )
    failed = []
    for entry, times in zip(calls, found, strict=True):
      if isinstance(times, Exception):
        self._failed(case, entry, times)
        failed.append(entry)
      else:
        entry.seconds = times.seconds
        if entry.peer is None:
          entry.columns["first_seconds"] = times.first_seconds
    return [entry for entry in entries if entry not in failed]

  def _finished(self, case: Case, entry: _Entry) -> bool:
    """Fills the entry's columns; False where that fails."""
    made = entry.made
    if isinstance(made, Measured):
      entry.seconds = made.seconds
      entry.columns |= made.columns
      return True
    try:
      entry.columns |= made.columns(made.run())
      if self._plan.profile and entry.peer is None:
        entry.columns |= _profile(made)
    except Exception as error:
      self._failed(case, entry, error)
      return False
    return True

  def _failed(self, case: Case, entry: _Entry, error: Exception) -> None:
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    self._note(f"{entry.title(case)} failed: {line[:200]}")

  def _note(self, line: str) -> None:
    if line not in self._noted:
      self._noted.add(line)
      self._tell(line)

  def _least(self, case: Case) -> Row:
    """The columns of the floor."""
    limits, source = case.ceilings, "measured"
    if limits is None:
      limits, source = self._ceilings(case.dtype)
    alone = {
      kind: sum(getattr(p, kind) / getattr(limits, kind) for p in case.phases)
      for kind in _BOUNDS
    }
    return {
      "floor_ms": 1e3 * limits.floor(case.phases),
      "bound": _BOUNDS[max(alone, key=alone.get)],
      "floor_bytes_ms": 1e3 * alone["bytes"],
      "floor_products_ms": 1e3 * alone["flops"],
      "gflop": sum(phase.flops for phase in case.phases) / 1e9,
      "peak": source,
      "peak_tflops": limits.flops / 1e12,
      "peak_gb_per_s": limits.bytes / 1e9,
    }

  def _ceilings(self, dtype: str) -> tuple[Ceilings, str]:
    if dtype not in self._limits:
      measured = self._plan.measure_ceilings
      self._limits[dtype] = (
        (ceilings.measure(dtype), "measured")
        if measured
        else ceilings.find(dtype)
      )
    return self._limits[dtype]


# What a phase counts -> what binds it.
_BOUNDS = {"flops": "products", "bytes": "bytes", "exps": "exponentials"}


def _profile(call: Call) -> Row:
  found = profiling.kernels(call.run)
  kernels = [
    dataclasses.asdict(kernel)
    | {"ms": kernel.ms / call.count, "launches": kernel.launches / call.count}
    for kernel in found
  ]
  return {
    "busy_ms": sum(kernel["ms"] for kernel in kernels),
    "kernels": kernels[:_KERNELS],
  }


def _row(
  case: Case, least: Row, own: _Entry | None, peer: _Entry | None
) -> Row:
  """The row of one of ours and one peer; either may be None."""
  row = {"op": case.op, "model": case.model, "shape": case.shape}
  row |= {"dtype": case.dtype, "pass": case.which}
  row |= {"implementation": None, "ms": None} | least | {"share": None}
  row |= {"peer": None, "peer_detail": None, "peer_ms": None}
  row |= {"error": None, "error_full": None} | case.columns
  if own is not None:
    row["implementation"], row["ms"] = own.name, 1e3 * own.seconds
    row["share"] = least["floor_ms"] / row["ms"]
    for name, amount in case.amounts.items():
      row[f"{name}_per_second"] = amount / own.seconds
    row |= own.columns
  if peer is not None:
    row["peer"], row["peer_ms"] = peer.name, 1e3 * peer.seconds
    row |= {"peer_detail": peer.detail} | peer.columns
  return row


# Column to its format; the first number is its width.
_COLUMNS = {
  "op": "<20",
  "model": "<13",
  "shape": "<26",
  "dtype": "<9",
  "pass": "<8",
  "implementation": "<15",
  "ms": ">11,.3f",
  "floor_ms": ">10,.3f",
  "share": ">7.1%",
  "error": ">8.1e",
  "error_full": ">11.1e",
  "peer": ">11",
  "peer_ms": ">11,.3f",
}


def _line(cells: Mapping[str, Any]) -> str:
  """One row of the printed table, or its head where all cells are None."""
  head = all(value is None for value in cells.values())
  line = []
  for name, form in _COLUMNS.items():
    value = cells[name]
    if value is None:
      form = form.split(".")[0].rstrip(",")
      value = name if head else "-"
    line.append(f"{value:{form}}")
  return " ".join(line).rstrip()
