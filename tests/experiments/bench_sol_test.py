"""The benchmark on the shipped model, and its floors against counts by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import InputError
from research.bench import ceilings
from research.bench.suites import sol as bench
from research.bench.suites.sol_work import Op
from research.cost.roofline import Ceilings, Phase

ROOT = Path(__file__).resolve().parents[2]
WINDOWS, GROUP, HORIZON, CONTEXT = 2, 3, 4, 16
TOKENS = WINDOWS * GROUP * HORIZON


def run(*arguments):
  return subprocess.run(
    [sys.executable, "experiments/bench_sol.py", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(ROOT),
      # Nearly all of the time is compilation.
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
    },
  )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  path = tmp_path_factory.mktemp("bench") / "cpu" / "sol_bench.json"
  done = run(
    "--model=random:tiny",
    "--preset=Q5Q16",
    f"--windows={WINDOWS}",
    f"--group_size={GROUP}",
    f"--horizon={HORIZON}",
    f"--context={CONTEXT}",
    "--repeats=3",
    f"--result={path}",
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  for row in found["rows"]:
    assert row["op"] in done.stdout
  return found


@pytest.fixture(scope="module")
def rows(result):
  return {row["op"]: row for row in result["rows"]}


def test_all_rows_are_timed_and_compiled_once(result, rows):
  assert list(rows) == [
    "prefill",
    "prefill+stats",
    "scan/uniform",
    "scan/policy",
    "block",
    "grpo_update",
  ]
  assert result["skipped"] == []
  for row in rows.values():
    assert row["compiles"] == 1, row["op"]
    backward = row["op"].endswith("_update")
    assert row["pass"] == ("fwd+bwd" if backward else "fwd")
    assert row["dtype"] == "float32" and row["preset"] == "Q5Q16"


def test_rates_and_shares_follow_from_the_times(rows):
  for name, row in rows.items():
    tokens = WINDOWS * CONTEXT if name.startswith("prefill") else TOKENS
    seconds = row["ms"] / 1e3
    assert seconds > 0
    assert row["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"])
    matmul = row["gflop"] / row["matmul_tflops"]
    assert row["matmul_ms"] == pytest.approx(matmul)
    assert row["matmul_share"] == pytest.approx(matmul / row["ms"])
    assert row["floor_ms"] >= row["matmul_ms"] * (1 - 1e-9)


def test_operations_are_those_of_the_matrix_products(rows):
  # The tiny shape: V 64, L 2, D 32, F 48, H 4, N 2, K 8.
  layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48
  head = 64 * 32
  seen = sum(CONTEXT + t + 1 for t in range(HORIZON))
  products = 2 * 2 * 4 * 8  # q k^T and its product with v, in two layers
  steps = 2 * TOKENS * (2 * layer + head)
  steps += 2 * WINDOWS * GROUP * products * seen
  assert rows["scan/uniform"]["gflop"] * 1e9 == pytest.approx(steps)
  assert rows["block"]["gflop"] * 1e9 == pytest.approx(steps)

  read = 2 * CONTEXT * 2 * layer + 2 * products * CONTEXT * (CONTEXT + 1) / 2
  prefill = rows["prefill"]["gflop"] * 1e9
  assert prefill == pytest.approx(WINDOWS * read)
  with_head = rows["prefill+stats"]["gflop"] * 1e9 - prefill
  assert with_head == pytest.approx(2 * WINDOWS * CONTEXT * head)


def test_bytes_are_weights_a_step_and_each_cache_once(rows):
  layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48
  weights = 4 * (2 * layer + 64 * 32)
  token = 4 * 2 * 2 * 2 * 8  # keys and values of two layers, two heads
  row = rows["scan/uniform"]
  flop = row["gflop"] * 1e9 / HORIZON / (row["matmul_tflops"] * 1e12)
  floor = 0.0
  for t in range(HORIZON):
    cached = token * (WINDOWS * CONTEXT + WINDOWS * GROUP * (t + 1))
    floor += max(flop, (weights + cached) / (row["copy_gb_per_s"] * 1e9))
  assert row["floor_ms"] == pytest.approx(1e3 * floor, rel=0.02)


def test_a_floor_takes_the_larger_time_of_each_phase():
  phases = (Phase(10.0, 1.0), Phase(1.0, 40.0))
  op = Op(name="", run=abs, inputs=tuple, tokens=1, phases=phases, shape="")
  assert Ceilings(flops=2.0, bytes=4.0).floor(op.phases) == 5.0 + 10.0


@pytest.fixture
def given_ceilings(monkeypatch):
  monkeypatch.setattr(ceilings, "measure", lambda *_: Ceilings(1e11, 1e10))


def test_parts_are_left_out_and_rows_chosen(given_ceilings):
  names = ("scan/dense/headless", "scan/dense/headless/one_layer")
  plan = bench.Plan(
    model="random:tiny",
    preset="Q5Q16",
    dtype="bfloat16",
    precision="default",
    context=CONTEXT,
    horizon=HORIZON,
    windows=WINDOWS,
    group_size=GROUP,
    breakdown=True,
    only=names,
    repeats=3,
  )
  said = []
  rows, skipped = bench.run(plan, 60.0, said.append)
  assert [row["op"] for row in rows] == list(names)
  assert [row["compiles"] for row in rows] == [1, 1]
  assert rows[0]["gflop"] > rows[1]["gflop"]
  assert said[-1].startswith("one layer of one step: ")
  assert skipped == []


def test_out_of_time_says_what_is_missing(given_ceilings):
  plan = bench.Plan(
    model="random:tiny",
    preset="Q5Q16",
    dtype="float32",
    precision="highest",
    only=("block",),
  )
  said = []
  assert bench.run(plan, 1e-9, said.append) == ([], ["block"])
  assert said[-1] == "out of time, not timed: block"


def test_precisions_pair_with_dtypes():
  three = ["highest", "tensorfloat32", "default"]
  assert bench.pair(["float32"], three) == [("float32", p) for p in three]
  assert bench.pair(["float32", "bfloat16"], ["highest", "default"]) == [
    ("float32", "highest"),
    ("bfloat16", "default"),
  ]
  with pytest.raises(InputError, match="2 values of dtype"):
    bench.pair(["float32", "bfloat16"], three)


@pytest.mark.parametrize(
  "flag, part",
  [
    ("--dtype=float8", "float32, bfloat16"),
    ("--matmul_precision=high", "tensorfloat32"),
    ("--model=random:none", "random:smollm2_135m"),
    ("--only=nothing", "scan/uniform"),
    ("--preset=none", "J-FL"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(flag, part):
  done = run("--model=random:tiny", flag)
  assert done.returncode == 2
  (line,) = [s for s in done.stderr.splitlines() if s.startswith("error: ")]
  assert part in line
  assert "Traceback" not in done.stderr
