"""Rows of made-up cases, timed by a made-up timer."""

import jax
import jax.numpy as jnp
import pytest

from ops import dispatch
from research.bench import ceilings, plan, profiling, specs, timing
from research.bench.case import Call, Case, Measured, Peer
from research.cost.roofline import Ceilings, Phase


@pytest.fixture(autouse=True)
def given(monkeypatch):
  """Ceilings, and times that the calls name themselves."""
  limits = Ceilings(flops=1e12, bytes=1e9, exps=1e9)
  monkeypatch.setattr(ceilings, "find", lambda dtype: (limits, "data sheet"))

  def medians(calls, *, repeats, seconds):
    return [
      found
      if isinstance(found := call.start(), Exception)
      else timing.Timed(found / call.count, 9.0)
      for call in calls
    ]

  monkeypatch.setattr(timing, "medians", medians)


def call(found, **more):
  return lambda: Call(start=lambda: found, wait=lambda _: None, **more)


def case(**changes):
  given = {
    "op": "work",
    "shape": "B1",
    "dtype": "bfloat16",
    "which": "fwd",
    "phases": (Phase(1e9, 1e6), Phase(0.0, 2e6)),
    "ours": {"xla": call(0.008)},
  }
  return Case(**(given | changes))


def run(*cases, **options):
  said, notes = [], []
  rows = plan.run(cases, plan.Plan(**options), said.append, notes.append)
  return list(rows), said, notes


def test_a_row_holds_times_rates_and_floors():
  columns = lambda output: {"error": output / 8}
  one = case(
    model="m",
    ours={"xla": call(0.016, count=2, columns=columns)},
    amounts={"tokens": 64},
    columns={"params": 7},
  )
  (row,), said, notes = run(one)
  assert notes == [] and len(said) == 2 and said[0].split()[0] == "op"
  names = ("op", "model", "shape", "dtype", "pass", "implementation")
  assert [row[name] for name in names] == [
    *("work", "m", "B1", "bfloat16", "fwd", "xla")
  ]
  assert (row["ms"], row["first_seconds"], row["params"]) == (8.0, 9.0, 7)
  assert row["tokens_per_second"] == 8000.0 and row["error"] == 0.002
  assert row["floor_ms"] == 1.0 + 2.0 and row["share"] == 3 / 8
  assert row["bound"] == "bytes" and row["floor_bytes_ms"] == 3.0
  assert row["floor_products_ms"] == 1.0 and row["gflop"] == 1.0
  assert row["peak"] == "data sheet" and row["peer"] is None


def test_what_binds_is_named_beside_the_floor_of_bytes():
  (row,), _, _ = run(case(phases=[Phase(1e9, 1e6, 5e6)]))
  assert (row["floor_ms"], row["bound"]) == (5.0, "exponentials")
  assert row["floor_bytes_ms"] == 1.0


def test_every_peer_stands_beside_every_implementation_at_its_best():
  fast = Peer(name="fast", ways={"a": call(0.004), "b": call(0.002)})
  known = Peer(
    name="known", ways={None: lambda: Measured(seconds=1.0, columns={"x": 1})}
  )
  other = Peer(name="other", ways={None: pytest.fail})
  one = case(
    ours={"xla": call(0.008), "best": call(0.001)}, peers=[fast, known, other]
  )
  rows, _, notes = run(one, peers=["fast", "known"])
  assert notes == []
  names = ("implementation", "ms", "peer", "peer_detail", "peer_ms")
  assert [tuple(row[name] for name in names) for row in rows] == [
    ("xla", 8.0, "fast", "b", 2.0),
    ("xla", 8.0, "known", None, 1000.0),
    ("best", 1.0, "fast", "b", 2.0),
    ("best", 1.0, "known", None, 1000.0),
  ]
  assert rows[1]["x"] == 1 and "x" not in rows[0]


def unsupported():
  raise dispatch.UnsupportedError("needs a TPU")


def broken(*_):
  raise RuntimeError("out of\nmemory")


@pytest.mark.parametrize(
  ("build", "note"),
  [
    (unsupported, "work bad fwd is left out: needs a TPU"),
    (broken, "work bad fwd failed: RuntimeError: out of memory"),
    (call(RuntimeError("no")), "work bad fwd failed: RuntimeError: no"),
    (
      call(0.001, columns=broken),
      "work bad fwd failed: RuntimeError: out of memory",
    ),
  ],
)
def test_one_that_does_not_run_costs_its_rows_alone(build, note):
  ours = {"bad": build, "xla": call(0.008)}
  rows, _, notes = run(case(ours=ours), case(ours=ours))
  assert [row["implementation"] for row in rows] == ["xla", "xla"]
  assert notes == [note]  # once


def test_a_peer_that_is_not_here_is_said_once_and_costs_nothing():
  away = Peer(name="away", missing=lambda: "no torch", ways={None: pytest.fail})
  rows, _, notes = run(*[case(peers=[away]) for _ in range(2)], peers=["away"])
  assert [row["peer"] for row in rows] == [None, None]
  assert notes == ["work peer away is left out: no torch"]


def test_a_peer_alone_has_a_row():
  peer = Peer(name="p", ways={"way": call(0.002)})
  (row,), _, _ = run(case(ours={"bad": broken}, peers=[peer]), peers=["p"])
  assert row["ms"] is row["share"] is row["implementation"] is None
  assert (row["peer"], row["peer_ms"]) == ("p", 2.0)


def test_passes_are_chosen_and_the_next_case_waits_for_the_last():
  asked = []

  def cases():
    for which in specs.PASSES:
      asked.append(which)
      yield case(which=which)

  rows = plan.run(cases(), plan.Plan(passes=["fwd", "bwd"]), print, print)
  assert next(rows)["pass"] == "fwd" and asked == ["fwd"]
  assert [row["pass"] for row in rows] == ["bwd"] and len(asked) == 3


def test_precision_holds_while_a_case_runs():
  found = []

  def build():
    found.append(jax.config.jax_default_matmul_precision)
    return call(0.001)()

  before = jax.config.jax_default_matmul_precision
  run(case(ours={"xla": build}, precision="float32"), case(ours={"xla": build}))
  assert found == ["float32", before]


def test_measured_ceilings_and_those_of_a_case(monkeypatch):
  slow = Ceilings(flops=1e11, bytes=1e8)
  monkeypatch.setattr(ceilings, "measure", lambda dtype: slow)
  (row,), _, _ = run(case(), measure_ceilings=True)
  assert (row["floor_ms"], row["peak"]) == (30.0, "measured")
  (row,), _, _ = run(case(ceilings=slow))
  assert (row["floor_ms"], row["peak"]) == (30.0, "measured")


def test_a_profile_is_of_one_pass(monkeypatch):
  kernels = [profiling.Kernel("gemm", 6.0, 4.0)] * 30
  monkeypatch.setattr(profiling, "kernels", lambda run: kernels)
  one = case(ours={"xla": call(0.008, count=2)})
  (row,), _, _ = run(one, profile=True)
  assert row["busy_ms"] == 90.0 and len(row["kernels"]) == 25
  assert row["kernels"][0] == {"name": "gemm", "ms": 3.0, "launches": 2.0}


def test_a_real_call_is_timed(monkeypatch):
  monkeypatch.undo()
  limits = Ceilings(flops=1e12, bytes=1e9)
  step = jax.jit(lambda x: x @ x)
  real = Call(start=lambda: step(jnp.ones((8, 8))), count=2)
  one = case(ours={"xla": lambda: real}, ceilings=limits)
  (row,), _, _ = run(one, repeats=3, seconds=0.1)
  assert row["first_seconds"] > 1e-3 * row["ms"] > 0
