"""Runs a benchmark of ops: times, floors, peers and errors."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from models.errors import InputError
from ops import dispatch
from research.bench import ceilings
from research.bench.peers import ops as peers
from research.bench.suites import op_passes as measure
from research.bench.suites.op_cases import BUILDERS, Case, build
from research.bench.timing import cold_sets, seconds_a_call
from research.cost.roofline import Ceilings

DTYPES = ("bfloat16", "float32")
PASSES = ("fwd", "bwd", "fwd+bwd")
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to time.

  Attributes:
    ops: names of ops, or none for all.
    shapes: "SIZE:BxL" each, or "OP=SIZE:BxL" for that op alone.
    dtypes: of activations.
    passes: of `PASSES`; ops of one decoding step have but the first.
    implementations: names, or none for all that run here.
    peers: names of peers.
    repeats: measurements of a row at most.
    seconds: of a row's measurements, about.
  """

  ops: Sequence[str] = ()
  shapes: Sequence[str] = ("tiny:2x64",)
  dtypes: Sequence[str] = DTYPES[:1]
  passes: Sequence[str] = PASSES[:1]
  implementations: Sequence[str] = ()
  peers: Sequence[str] = ()
  repeats: int = 20
  seconds: float = 2.0

  def check(self) -> None:
    """Raises InputError where a name does not exist."""
    alone = [shape.split("=")[0] for shape in self.shapes if "=" in shape]
    for flag, values, valid in (
      ("ops", self.ops, BUILDERS),
      ("shapes", alone, BUILDERS),
      ("dtype", self.dtypes, DTYPES),
      ("passes", self.passes, PASSES),
      ("implementations", self.implementations, IMPLEMENTATIONS),
      ("peers", self.peers, peers.PEERS),
    ):
      for value in values:
        if value not in valid:
          raise InputError(f"{flag}={value}: take from {', '.join(valid)}")


def run(
  plan: Plan,
  say: Callable[[str], None],
  keep: Callable[[list[dict], list[str]], None] = lambda rows, notes: None,
) -> tuple[list[dict], list[str]]:
  """Times a plan, and prints a table.

  Args:
    plan: what to time.
    say: prints a line.
    keep: takes what `run` would return, so far, after every row.

  Returns:
    Rows, one for each implementation, pass and peer; and a line for each thing
    that was left out.

  Raises:
    InputError: a name or shape does not exist.
  """
  plan.check()
  notes: list[str] = []

  def note(line: str) -> None:
    notes.append(line)
    say(line)

  say(_line(dict.fromkeys(_COLUMNS)))
  rows = []
  for dtype in plan.dtypes:
    limits, source = ceilings.find(dtype)
    for op in plan.ops or BUILDERS:
      present = _present(op, plan, notes, note)
      for shape in plan.shapes:
        alone, _, axes = shape.rpartition("=")
        if alone not in ("", op):
          continue
        case = build(op, axes, dtype)
        for row in _rows(case, plan, present, limits, note):
          rows.append(row | {"dtype": dtype, "peak": source})
          say(_line(rows[-1]))
          keep(rows, notes)
  return rows, notes


def _present(op: str, plan: Plan, notes: Sequence[str], note) -> list[str]:
  """Peers whose op is here; an absent one is said once."""
  found = []
  for peer in plan.peers:
    reason = peers.missing(peer, op)
    if reason is None:
      found.append(peer)
      continue
    line = f"{op} peer {peer} is left out: {reason}"
    if line not in notes:
      note(line)
  return found


def _rows(case: Case, plan: Plan, present, limits: Ceilings, note):
  usable = list(_usable(case, plan, note))
  errors = measure.Errors(case, note)
  sets = cold_sets(case.arrays, jax.default_backend())
  for which in plan.passes:
    if which != "fwd" and not case.differentiable:
      continue
    others = [_time_peer(case, sets, plan, p, which, note) for p in present]
    others = [entry for entry in others if entry] or [{"peer": None}]
    for name in usable:
      try:
        timed = _time(case, sets, plan, name, which, errors)
      except Exception as error:  # one kernel must not cost all other rows
        line = " ".join(str(error).split())[:200]
        note(f"{case.op} {name} {which} failed: {type(error).__name__}: {line}")
        continue
      floor = 1e3 * limits.floor(case.phases(which))
      for entry in others:
        yield {
          "op": case.op,
          "shape": case.shape,
          "pass": which,
          "implementation": name,
          "floor_ms": floor,
          "share": floor / timed["ms"],
          "sets": len(sets),
          "peer_detail": None,
          "peer_ms": None,
          **timed,
          **entry,
        }


def _usable(case: Case, plan: Plan, note):
  """Names of implementations that run here."""
  home = importlib.import_module(case.function.__module__)
  table: Mapping[str, Any] = getattr(home, "IMPLEMENTATIONS", dispatch.XLA_ONLY)
  for name in plan.implementations or table:
    try:
      jax.eval_shape(lambda arrays, n=name: case.call(arrays, n), case.arrays)
    except dispatch.UnsupportedError as error:
      if plan.implementations:
        note(f"left out: {error}")
    else:
      yield name


def _time(
  case: Case, sets, plan: Plan, name: str, which: str, errors: measure.Errors
) -> dict:
  """A row's columns of an implementation."""
  function = lambda arrays: case.call(arrays, name)
  passes = measure.passes_of(sets, jax.default_backend())
  call = measure.prepare(function, sets, which, passes=passes)
  found = errors.of(name, which, call()[0])
  seconds = seconds_a_call(
    call, jax.block_until_ready, repeats=plan.repeats, seconds=plan.seconds
  )
  return {"ms": 1e3 * seconds / passes, **found}


def _time_peer(case: Case, sets, plan: Plan, peer: str, which: str, note):
  """A row's columns of a peer at its best, or None where it has none."""
  found = []
  for detail in peers.details(peer, case):
    try:
      timed = _time_detail(case, sets, plan, peer, which, detail)
    except Exception as error:  # for example, out of memory
      line = " ".join(filter(None, [detail, "failed:", *str(error).split()]))
      note(f"{case.op} peer {peer} {which} {line[:200]}")
    else:
      found.append({"peer": peer, "peer_detail": detail, **timed})
  return min(found, key=lambda entry: entry["peer_ms"], default=None)


def _time_detail(case: Case, sets, plan: Plan, peer, which, detail) -> dict:
  prepared = peers.make(peer, case, which, sets, detail)
  error = None
  if prepared.y is not None:
    error = measure.forward_error(case, prepared.y(prepared.call()))
  seconds = seconds_a_call(
    prepared.call, prepared.wait, repeats=plan.repeats, seconds=plan.seconds
  )
  return {"peer_ms": 1e3 * seconds / prepared.passes, "peer_error": error}


# Column to its format; the first number is its width.
_COLUMNS = {
  "op": "<21",
  "shape": "<30",
  "dtype": "<10",
  "pass": "<9",
  "implementation": "<15",
  "ms": ">10.3f",
  "floor_ms": ">10.3f",
  "share": ">8.1%",
  "error": ">10.1e",
  "error_full": ">11.1e",
  "peer": ">11",
  "peer_ms": ">10.3f",
}


def _line(cells: dict[str, Any]) -> str:
  """One row of the table, or its head where all cells are None."""
  head = all(value is None for value in cells.values())
  line = []
  for name, form in _COLUMNS.items():
    value = cells[name]
    if value is None:
      form = form.split(".")[0]
      value = name if head else "-"
    line.append(f"{value:{form}}")
  return " ".join(line).rstrip()
