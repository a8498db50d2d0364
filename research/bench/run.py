"""Runs a benchmark of ops: times, floors, peers and errors."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models.errors import InputError
from ops import dispatch
from research.bench import measure, peaks, peers
from research.bench.cases import BUILDERS, Case, build
from research.core.timing import Ceilings, seconds_a_call

DTYPES = ("bfloat16", "float32")
PASSES = ("fwd", "bwd", "fwd+bwd")
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to time.

  Attributes:
    ops: names of ops, or none for all.
    shapes: "SIZE:BxL" each.
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
    for flag, values, valid in (
      ("ops", self.ops, BUILDERS),
      ("dtype", self.dtypes, DTYPES),
      ("passes", self.passes, PASSES),
      ("implementations", self.implementations, IMPLEMENTATIONS),
      ("peers", self.peers, peers.PEERS),
    ):
      for value in values:
        if value not in valid:
          raise InputError(f"{flag}={value}: take from {', '.join(valid)}")


def run(plan: Plan, say: Callable[[str], None]) -> tuple[list[dict], list[str]]:
  """Times a plan, and prints a table.

  Args:
    plan: what to time.
    say: prints a line.

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

  present = []
  for peer in plan.peers:
    reason = peers.missing(peer)
    if reason is None:
      present.append(peer)
    else:
      note(f"peer {peer} is left out: {reason}")
  say(_line(dict.fromkeys(_COLUMNS)))
  rows = []
  for dtype in plan.dtypes:
    limits, source = peaks.ceilings(dtype)
    for op in plan.ops or BUILDERS:
      for shape in plan.shapes:
        case = build(op, shape, dtype)
        for row in _rows(case, plan, present, limits, note):
          rows.append(row | {"dtype": dtype, "peak": source})
          say(_line(rows[-1]))
  return rows, notes


def _rows(case: Case, plan: Plan, present, limits: Ceilings, note):
  usable = list(_usable(case, plan, note))
  errors: dict[str, float] = {}
  for which in plan.passes:
    if which != "fwd" and not case.differentiable:
      continue
    compared = [_time_peer(case, plan, p, which, note) for p in present]
    compared = [entry for entry in compared if entry] or [{"peer": None}]
    for name in usable:
      try:
        timed = _time(case, plan, name, which, errors)
      except Exception as error:  # one kernel must not cost all other rows
        line = " ".join(str(error).split())[:200]
        note(f"{case.op} {name} {which} failed: {type(error).__name__}: {line}")
        continue
      floor = 1e3 * limits.floor(_Work(case.phases(which)))
      for entry in compared:
        yield {
          "op": case.op,
          "shape": case.shape,
          "pass": which,
          "implementation": name,
          "floor_ms": floor,
          "share": floor / timed["ms"],
          "peer_ms": None,
          **timed,
          **entry,
        }


@dataclasses.dataclass(frozen=True)
class _Work:
  phases: tuple


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


def _time(case: Case, plan: Plan, name: str, which: str, errors: dict) -> dict:
  """A row's columns of an implementation; `errors` keeps that of gradients."""
  function = lambda arrays: case.call(arrays, name)
  call = measure.prepare(function, case.arrays, which)
  if which == "fwd":
    error = measure.forward_error(case, np.asarray(measure.y_of(call())))
  else:
    if name not in errors:
      errors[name] = measure.backward_error(case, name)
    error = errors[name]
  seconds = seconds_a_call(
    call, jax.block_until_ready, repeats=plan.repeats, seconds=plan.seconds
  )
  return {"ms": 1e3 * seconds, "error": error}


def _time_peer(case: Case, plan: Plan, peer: str, which: str, note):
  """A row's columns of a peer, or None where it has nothing to show."""
  try:
    prepared = peers.make(peer, case, which)
    if prepared is None:
      return None
    found = {"peer": peer, "peer_error": None}
    if prepared.y is not None:
      y = prepared.y(prepared.call())
      found["peer_error"] = measure.forward_error(case, y)
    seconds = seconds_a_call(
      prepared.call, prepared.wait, repeats=plan.repeats, seconds=plan.seconds
    )
  except Exception as error:  # for example, out of memory
    line = " ".join(str(error).split())[:200]
    note(f"{case.op} peer {peer} {which} failed: {line}")
    return None
  return found | {"peer_ms": 1e3 * seconds}


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
