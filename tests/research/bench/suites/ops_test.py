import pytest

from models.errors import InputError
from research.bench import ceilings
from research.bench.suites import op_passes as measure
from research.bench.suites import ops as run
from research.cost.roofline import Ceilings


@pytest.fixture(autouse=True)
def given(monkeypatch):
  """Ceilings and times that need no measuring."""
  limits = Ceilings(flops=1e12, bytes=1e11), "measured"
  monkeypatch.setattr(ceilings, "find", lambda dtype: limits)
  monkeypatch.setattr(run, "seconds_a_call", lambda call, wait, **_: 2e-3)


def plan(**changes):
  given = {"ops": ["causal_conv1d"], "shapes": ["tiny:1x8"]}
  return run.Plan(**(given | {"dtypes": ["float32"]} | changes))


def test_rows_and_table():
  said = []
  rows, notes = run.run(
    plan(passes=["fwd", "bwd"], peers=["plain"]), said.append
  )
  assert notes == [] and len(said) == 1 + len(rows)
  assert [row["pass"] for row in rows] == ["fwd", "bwd"]
  for row, line in zip(rows, said[1:]):
    assert row["op"] == "causal_conv1d" and row["implementation"] == "xla"
    assert row["shape"] == "B1 L8 D64 K4" and row["dtype"] == "float32"
    assert row["ms"] == row["peer_ms"] == 2.0 and row["peer"] == "plain"
    assert 0 < row["floor_ms"] == pytest.approx(2.0 * row["share"])
    assert row["error"] < 1e-5 and row["peak"] == "measured"
    assert line.split()[:1] == ["causal_conv1d"] and "plain" in line
  assert rows[0]["peer_error"] < 1e-5 and rows[1]["peer_error"] is None


def test_steps_have_no_backward_and_no_plain_peer():
  rows, notes = run.run(
    plan(
      ops=["causal_conv1d_step"], passes=["fwd", "fwd+bwd"], peers=["plain"]
    ),
    lambda line: None,
  )
  assert notes == []
  (row,) = rows
  assert (row["pass"], row["peer"], row["peer_ms"]) == ("fwd", None, None)


def test_what_does_not_run_here_is_said():
  said = []
  rows, notes = run.run(
    plan(implementations=["mosaic_tpu", "xla"], peers=["mamba_ssm"]),
    said.append,
  )
  assert [row["implementation"] for row in rows] == ["xla"]
  assert "causal_conv1d peer mamba_ssm is left out" in notes[0]
  assert "'mosaic_tpu' does not run here: needs a TPU" in notes[1]
  assert set(notes) <= set(said)


def test_a_failing_implementation_costs_only_its_rows(monkeypatch):
  def fail(case, name):
    raise RuntimeError("out of\nmemory")

  monkeypatch.setattr(measure, "backward_error", fail)
  rows, notes = run.run(plan(passes=["bwd", "fwd"]), lambda line: None)
  assert [row["pass"] for row in rows] == ["fwd"]
  assert notes == ["causal_conv1d xla bwd failed: RuntimeError: out of memory"]


def test_a_shape_for_one_op_alone():
  rows, _ = run.run(
    plan(
      ops=["causal_conv1d", "causal_conv1d_step"],
      shapes=["tiny:1x8", "causal_conv1d=tiny:1x9"],
    ),
    lambda line: None,
  )
  assert [row["shape"][:5] for row in rows] == ["B1 L8", "B1 L9", "B1 T1"]


def test_what_was_timed_is_kept_after_every_row():
  kept = []
  rows, notes = run.run(
    plan(passes=["fwd", "bwd"]),
    lambda line: None,
    lambda rows, notes: kept.append((list(rows), list(notes))),
  )
  assert kept == [(rows[:1], []), (rows, notes)]


@pytest.mark.parametrize(
  "change, says",
  [
    ({"ops": ["sort"]}, "ops=sort"),
    ({"shapes": ["sort=tiny:1x8"]}, "shapes=sort: take from"),
    ({"dtypes": ["int8"]}, "dtype=int8: take from bfloat16, float32"),
    ({"passes": ["back"]}, "passes=back"),
    ({"implementations": ["triton"]}, "implementations=triton"),
    ({"peers": ["flash"]}, "peers=flash: take from plain, mamba_ssm"),
  ],
)
def test_unknown_names(change, says):
  with pytest.raises(InputError, match=says):
    run.run(plan(**change), lambda line: None)
