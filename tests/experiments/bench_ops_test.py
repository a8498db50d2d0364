import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
  "op shape dtype pass implementation ms sets peer peer_detail peer_ms "
  "floor_ms error error_full".split()
)


def run(*arguments):
  return subprocess.run(
    [sys.executable, "experiments/bench_ops.py", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )


def test_a_run_writes_rows_and_a_table(tmp_path):
  path = tmp_path / "ops.json"
  done = run(
    "--ops=causal_conv1d,token_logprob",
    "--shapes=tiny:1x8",
    "--dtype=float32",
    "--passes=fwd",
    "--peers=plain,mamba_ssm",
    "--repeats=2",
    "--seconds=0.1",
    f"--result={path}",
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  assert found["complete"] is True
  assert [row["op"] for row in found["rows"]] == [
    "causal_conv1d",
    "token_logprob",
  ]
  for row in found["rows"]:
    assert row.keys() >= set(COLUMNS)
    assert min(row["ms"], row["peer_ms"], row["floor_ms"]) > 0
    assert max(row["error"], row["error_full"], row["peer_error"]) < 1e-5
    assert row["sets"] == 1  # on a CPU
    assert row["op"] in done.stdout
  (line,) = found["left_out"]
  assert line.startswith("causal_conv1d peer mamba_ssm is left out: ")
  assert line in done.stdout.splitlines()


@pytest.mark.parametrize(
  "flag, part",
  [
    ("--shapes=70b:1x8", "write SIZE:BxL"),
    ("--repeats=0", "repeats"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(flag, part):
  done = run(flag)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and part in line
