"""The script of all benchmarks; what the suites do is tested beside them."""

import json

from tests.experiments import processes

SCRIPT = ("experiments/bench.py",)


def test_a_run_writes_rows_and_a_table(tmp_path):
  path = tmp_path / "deep" / "ops.json"
  code, out, err = processes.run(
    tmp_path,
    SCRIPT,
    "--suite=ops",
    "--ops=causal_conv1d",
    "--shapes=tiny:1x8",
    "--dtype=float32",
    "--passes=fwd",
    "--peers=plain,mamba_ssm",
    "--repeats=2",
    "--seconds=0.1",
    f"--result={path}",
    # What this machine can is measured on large arrays.
    JAX_DISABLE_MOST_OPTIMIZATIONS="0",
  )
  assert code == 0, err
  found = json.loads(path.read_text())
  assert found["complete"] is True and found["device"] == "cpu x1"
  (row,) = found["rows"]
  assert row["op"] == "causal_conv1d" and row["op"] in out
  assert min(row["ms"], row["peer_ms"], row["floor_ms"]) > 0
  assert max(row["error"], row["error_full"], row["peer_error"]) < 1e-5
  (line,) = found["left_out"]
  assert line.startswith("causal_conv1d peer mamba_ssm is left out: ")
  assert line in out.splitlines()


def test_a_flag_of_another_suite_is_one_line(tmp_path):
  code, _, err = processes.run(
    tmp_path, SCRIPT, "--suite=sol", "--sample=512/2+2:4x8x2:float32"
  )
  assert code == 2
  (line,) = err.splitlines()
  assert line.startswith("error: --sample: is of --suite=regression_lm, not")
