"""The suite of ops: every op on the shapes of published models."""

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from ops import dispatch
from research.bench import specs
from research.bench.case import Call, Case, Peer, Row, SuiteOfCases
from research.bench.peers import ops as peers
from research.bench.plan import Plan
from research.bench.specs import DTYPES, PASSES
from research.bench.suites import op_passes
from research.bench.suites.op_cases import BUILDERS, OpCase, build
from research.bench.timing import cold_sets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(SuiteOfCases):
  """Which ops, and on what.

  Attributes:
    ops: names of ops, or none for all.
    shapes: "SIZE:BxL" each, or "OP=SIZE:BxL" for that op alone.
    dtype: of activations.
    implementations: names, or none for all that run here.
  """

  ops: Sequence[str] = ()
  shapes: Sequence[str] = ("tiny:2x64",)
  dtype: Sequence[str] = DTYPES[:1]
  implementations: Sequence[str] = ()

  def cases(self, plan: Plan, note: Any) -> Iterator[Case]:
    """Yields a case an op, shape, dtype and pass.

    Raises:
      InputError: a name or shape does not exist.
    """
    del note
    specs.check_ops(**vars(self), passes=plan.passes, peers=plan.peers or ())
    return self._cases()

  def _cases(self) -> Iterator[Case]:
    for dtype in self.dtype:
      for op in self.ops or BUILDERS:
        for shape in self.shapes:
          alone, _, axes = shape.rpartition("=")
          if alone in ("", op):
            case = build(op, axes, dtype)
            names = self.implementations or list(_usable(case))
            yield from _passes(case, dtype, names)


def _usable(op: OpCase) -> Iterator[str]:
  """Names of implementations that run here."""
  home = importlib.import_module(op.function.__module__)
  for name in getattr(home, "IMPLEMENTATIONS", dispatch.XLA_ONLY):
    try:
      jax.eval_shape(functools.partial(op.call, implementation=name), op.arrays)
    except dispatch.UnsupportedError:
      continue
    yield name


def _passes(op: OpCase, dtype: str, names: Sequence[str]) -> Iterator[Case]:
  """The passes of an op; what they share is made once, when it is needed."""
  sets = functools.cache(lambda: cold_sets(op.arrays, jax.default_backend()))
  errors = op_passes.Errors(op)
  for which in PASSES if op.differentiable else PASSES[:1]:
    yield Case(
      op=op.op,
      shape=op.shape,
      dtype=dtype,
      which=which,
      phases=op.phases(which),
      ours={
        name: functools.partial(_call, op, sets, name, which, errors)
        for name in names
      },
      peers=[
        Peer(
          name=name,
          missing=functools.partial(peers.missing, name, op.op),
          ways={
            detail: functools.partial(_peer, name, op, which, sets, detail)
            for detail in peers.details(name, op)
          },
        )
        for name in specs.OP_PEERS
      ],
    )


def _call(op: OpCase, sets, name: str, which: str, errors) -> Call:
  """A pass of an implementation.

  Raises:
    UnsupportedError: it does not run here.
  """
  function = lambda arrays: op.call(arrays, name)
  jax.eval_shape(function, op.arrays)
  count = op_passes.passes_of(sets(), jax.default_backend())

  def columns(output) -> Row:
    return errors.of(name, which, output[0]) | {"sets": len(sets())}

  start = op_passes.prepare(function, sets(), which, passes=count)
  return Call(start=start, count=count, columns=columns)


def _peer(name: str, op: OpCase, which: str, sets, detail) -> Call:
  return peers.make(name, op, which, sets(), detail)
