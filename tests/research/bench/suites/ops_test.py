import pytest

from models.errors import InputError
from research.bench import ceilings, plan, timing
from research.bench.suites import op_passes
from research.bench.suites.ops import Suite
from research.cost.roofline import Ceilings


@pytest.fixture(autouse=True)
def given(monkeypatch):
  """Ceilings and times that need no measuring."""
  limits = Ceilings(flops=1e12, bytes=1e11), "measured"
  monkeypatch.setattr(ceilings, "find", lambda dtype: limits)
  monkeypatch.setattr(
    timing,
    "medians",
    lambda calls, **_: [timing.Timed(2e-3 / call.count, 0.1) for call in calls],
  )


def run(passes=("fwd",), peers=(), **changes):
  given = {"ops": ["causal_conv1d"], "shapes": ["tiny:1x8"]}
  suite = Suite(**(given | {"dtype": ["float32"]} | changes))
  options, notes = plan.Plan(passes=passes, peers=peers), []
  cases = suite.cases(options, notes.append)
  return list(plan.run(cases, options, print, notes.append)), notes


def test_rows():
  rows, notes = run(["fwd", "bwd"], ["plain"])
  assert notes == []
  assert [row["pass"] for row in rows] == ["fwd", "bwd"]
  for row in rows:
    assert row["op"] == "causal_conv1d" and row["implementation"] == "xla"
    assert row["shape"] == "B1 L8 D64 K4" and row["dtype"] == "float32"
    assert row["ms"] == row["peer_ms"] == 2.0 and row["peer"] == "plain"
    assert 0 < row["floor_ms"] == pytest.approx(2.0 * row["share"])
    assert row["error"] < 1e-5 and row["peak"] == "measured"
    assert row["error_full"] < 1e-5 and row["sets"] == 1
  assert rows[0]["peer_error"] < 1e-5 and rows[1]["peer_error"] is None


def test_steps_have_no_backward_and_no_plain_peer():
  rows, notes = run(["fwd", "fwd+bwd"], ["plain"], ops=["causal_conv1d_step"])
  assert notes == []
  (row,) = rows
  assert (row["pass"], row["peer"], row["peer_ms"]) == ("fwd", None, None)


def test_what_does_not_run_here_is_said():
  rows, notes = run(peers=["mamba_ssm"], implementations=["mosaic_tpu", "xla"])
  assert [row["implementation"] for row in rows] == ["xla"]
  assert "'mosaic_tpu' does not run here: needs a TPU" in notes[0]
  assert "causal_conv1d peer mamba_ssm is left out" in notes[1]


def test_a_failing_implementation_costs_only_its_rows(monkeypatch):
  def fail(case, name):
    raise RuntimeError("out of\nmemory")

  monkeypatch.setattr(op_passes, "backward_error", fail)
  rows, notes = run(["bwd", "fwd"])
  assert [row["pass"] for row in rows] == ["fwd"]
  assert notes == ["causal_conv1d xla bwd failed: RuntimeError: out of memory"]


def test_a_shape_for_one_op_alone():
  rows, _ = run(
    ops=["causal_conv1d", "causal_conv1d_step"],
    shapes=["tiny:1x8", "causal_conv1d=tiny:1x9"],
  )
  assert [row["shape"][:5] for row in rows] == ["B1 L8", "B1 L9", "B1 T1"]


@pytest.mark.parametrize(
  "change, says",
  [
    ({"ops": ["sort"]}, "ops=sort"),
    ({"shapes": ["sort=tiny:1x8"]}, "shapes=sort: take from"),
    ({"shapes": ["70b:1x8"]}, "write SIZE:BxL"),
    ({"dtype": ["int8"]}, "dtype=int8: take from bfloat16, float32"),
    ({"passes": ["back"]}, "passes=back"),
    ({"implementations": ["triton"]}, "implementations=triton"),
    ({"peers": ["flash"]}, "peers=flash: take from plain, mamba_ssm"),
  ],
)
def test_unknown_names(change, says):
  with pytest.raises(InputError, match=says):
    run(**change)
