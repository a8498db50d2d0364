import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "experiments/bench_lm.py", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )


def test_a_run_times_decoding_and_training(tmp_path):
  path = tmp_path / "lm.json"
  done = run(
    "--decode=tiny_mamba2:2",
    "--train=mamba2/tiny:1x32",
    "--tokens=2",
    "--repeats=1",
    "--unroll=0",
    "--peer",
    "--profile",
    f"--result={path}",
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  decode, update = found["rows"]
  assert found["complete"] is True
  assert decode["implementation"] == "xla"
  # bfloat16 has 8 bits; the logits are sums of some layers' roundings.
  assert 0 < decode["error"] < 0.05
  assert update["params"] > 1e5 and update["kernels"] == []  # on a CPU
  for row in found["rows"]:
    assert row["ms"] > row["floor_ms"] > 0
    assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"])
    assert row["peer_ms"] is None
  assert len(found["left_out"]) == 2
  assert any("mosaic_gpu" in line for line in found["left_out"])
  assert any("mamba_ssm" in line for line in found["left_out"])


@pytest.mark.parametrize(
  "flag, part",
  [
    ("--decode=mamba2_70b:1", "write MODEL:BATCH"),
    ("--decode=mamba2_130m", "write MODEL:BATCH"),
    ("--train=mamba2/60m", "write ARCH/PRESET:BxL"),
    ("--train=mamba2/70b:1x8", "preset"),
    ("--train=rnn/60m:1x8", "unknown"),
    ("--steps=cuda", "take from xla"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(flag, part):
  done = run(flag)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and part in line
