import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "experiments/bench_rlm.py", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )


def test_a_run_times_an_update_and_draws(tmp_path):
  path = tmp_path / "rlm.json"
  done = run(
    "--train=16/1+1:2x16:bfloat16",
    "--sample=16/1+1:2x16x3:float32",
    "--repeats=1",
    "--profile",
    f"--result={path}",
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  assert found["complete"] is True
  assert any("regress-lm is left out" in line for line in found["left_out"])
  update, draws = found["rows"]
  assert update["work"] == "update" and draws["work"] == "draws"
  for row in (update, draws):
    assert row["seconds"] > row["floor_seconds"] > 0
    assert row["share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert row["examples_per_second"] == pytest.approx(2 / row["seconds"])
    assert row["kernels"] == []  # on a CPU


@pytest.mark.parametrize(
  "flag, part",
  [
    ("--train=512/2+2:64:bfloat16", "write WIDTH/ENCODER+DECODER:BATCHxLENGTH"),
    ("--train=512/2+2:64x8:float64", "write WIDTH"),
    ("--sample=500/2+2:4x8x2:float32", "a multiple of 16"),
    ("--peer=/nowhere", "give a checkout"),
    ("--peer_settings=int8", "take some of"),
  ],
)
def test_mistakes_are_one_line(flag, part):
  done = run(flag)
  assert done.returncode == 2 and part in done.stderr
  assert len(done.stderr.splitlines()) == 1
