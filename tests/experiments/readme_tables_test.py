"""README tables: written from result files, compared, and their errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMPTY = "above\n<!-- table: {} -->\n<!-- end -->\nbelow\n"
HEADER = {"command": "python x.py", "commit": "abc", "device": "cpu x1"}
COMMON = {
  "model": "tiny",
  "data": "text",
  "preset": "J-FL",
  "tokens": 12345,
  "kappa": 0.4,
  "rho": 0.5,
  "bits": 6.25,
  "flops": 0.7,
  "bytes": 0.8,
}
BENCH = {
  "shape": "W1 S64",
  "dtype": "bfloat16",
  "matmul_precision": "default",
  "matmul_tflops": 700.0,
  "copy_gb_per_s": 4000.0,
  "ms": 4.0,
  "tokens_per_second": 16000.0,
  "floor_ms": 1.0,
  "share": 0.25,
}


OPS = {
  "op": "ssd",
  "shape": "B8 L2048 H24",
  "dtype": "bfloat16",
  "pass": "fwd",
  "implementation": "mosaic_gpu",
  "ms": 0.5,
  "floor_ms": 0.125,
  "share": 0.25,
  "error": 0.0021,
  "error_full": None,
  "peer": "mamba_ssm",
  "peer_detail": "chunk 128",
  "peer_ms": 0.8,
}


def row(method, role, asked, budget, value, difference=None):
  made = COMMON | {"method": method, "role": role, "asked": asked}
  made |= {"budget": budget, "value": value}
  if difference is not None:
    ends = zip(("", "_low", "_high"), difference)
    made |= {f"policy_minus_method{end}": number for end, number in ends}
  return made


QUALITY = [
  row("dense", "reference", None, 1.0, 20.0),
  row("SOL policy", "ours", 0.4, 0.405, 30.0),
  row("SOL policy", "ours", 0.6, 0.61, 25.0),
  row("warm start only", "ours", 0.4, 0.42, 31.0),
  row("fixed", "baseline", 0.4, 0.405, 32.0, (-0.06, -0.07, -0.05)),
  row("fixed", "baseline", 0.6, 0.61, 24.0, (0.04, 0.03, 0.05)),
  row("best static", "baseline", 0.4, 0.405, 30.0, (0.0, -0.01, 0.01)),
  # At another budget: shown with it, and not counted.
  row("best static", "baseline", 0.6, 0.7, 26.0, (-0.04, -0.05, -0.03)),
  row("per-token oracle", "oracle", 0.4, 0.405, 28.0, (0.07, 0.06, 0.08)),
  row("Quest@50", "static", None, 0.833, 21.0),
  {"method": "random trials", "role": "distribution", "value": [1.0, 2.0]},
]


def fill(folder, *arguments):
  return subprocess.run(
    [
      sys.executable,
      "experiments/readme_tables.py",
      f"--readme={folder / 'README.md'}",
      *arguments,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )


def write(folder, rows):
  (folder / "README.md").write_text(EMPTY.format("found.json"))
  result = HEADER | {"seconds": 61.0, "rows": rows}
  (folder / "found.json").write_text(json.dumps(result))


def lines_of(folder):
  """First cell to the other cells of every line of the table."""
  lines = (folder / "README.md").read_text().splitlines()
  cells = [line.strip("| ").split("|") for line in lines if line[:1] == "|"]
  return {first.strip(): [c.strip() for c in rest] for first, *rest in cells}


def test_the_readme_is_up_to_date():
  done = fill(ROOT, "--check")
  assert done.returncode == 0, done.stderr


def test_an_evaluation_has_a_line_a_method_and_a_column_a_budget(tmp_path):
  write(tmp_path, QUALITY)
  assert fill(tmp_path).returncode == 0
  lines = lines_of(tmp_path)
  assert lines["method"] == [
    "net keep 0.405 (asked 0.4)",
    "net keep 0.610 (asked 0.6)",
  ]
  assert lines["SOL policy"] == ["30.000", "25.000"]
  assert lines["warm start only"] == ["31.000 at 0.420", "–"]
  assert lines["fixed"] == [
    "32.000; -0.0600 [-0.0700, -0.0500]",
    "24.000; +0.0400 [+0.0300, +0.0500]",
  ]
  assert lines["best static"][1].startswith("26.000 at 0.700; -0.0400")
  assert "per-token oracle (sees labels)" in lines
  assert lines["SOL policy: kappa, rho, bits"] == ["0.400, 0.500, 6.250"] * 2
  assert lines["SOL policy: flops, bytes"] == ["0.700, 0.800"] * 2
  assert "dense" not in lines and "random trials" not in lines
  text = (tmp_path / "README.md").read_text()
  assert "12,345 tokens, actions J-FL; dense perplexity 20.000" in text
  assert "Of 3 comparisons" in text and "better in 1 and worse in 1" in text
  assert "Quest@50 21.000 at 0.833" in text
  assert "[found.json](found.json): cpu x1, 61 s, commit abc" in text
  assert text.startswith("above\n") and text.endswith("<!-- end -->\nbelow\n")


def test_a_benchmark_leaves_out_the_breakdown(tmp_path):
  write(tmp_path, [BENCH | {"op": name} for name in ("block", "scan/dense")])
  assert fill(tmp_path).returncode == 0
  lines = lines_of(tmp_path)
  cells = ["4.00", "250.0", "16,000", "1.000", "25.0%"]
  assert lines["block"] == ["W1 S64", "bfloat16, default", *cells]
  assert "scan/dense" not in lines
  text = (tmp_path / "README.md").read_text()
  assert "Ceilings: 700 TFLOP/s, 4,000.0 GB/s (bfloat16, default)" in text


def test_ops_are_compared_with_peers(tmp_path):
  alone = {"op": "token_logprob", "error": None, "error_full": 0.003}
  alone |= {"peer": None, "peer_detail": None, "peer_ms": None}
  plain = {"op": "conv", "peer": "plain", "peer_detail": None, "ms": 1234.5}
  write(tmp_path, [OPS, OPS | alone, OPS | plain])
  assert fill(tmp_path).returncode == 0
  lines = lines_of(tmp_path)
  shared = ["B8 L2048 H24", "bfloat16", "fwd", "mosaic_gpu"]
  peer = ["mamba_ssm, chunk 128", "0.800", "0.62"]
  floor = ["0.125", "25.0%"]
  assert lines["op"][-7:] == [
    *("peer", "peer ms", "ms / peer ms", "floor ms", "share"),
    *("error", "error, full"),
  ]
  assert lines["ssd"] == [*shared, "0.500", *peer, *floor, "2.1e-03", "–"]
  none = ["–"] * 3
  assert lines["token_logprob"] == [
    *(*shared, "0.500", *none, *floor, "–", "3.0e-03")
  ]
  assert lines["conv"][4:6] == ["1,234.500", "plain"]


def test_what_was_not_measured_is_said(tmp_path):
  (tmp_path / "README.md").write_text(EMPTY.format("no.json"))
  assert fill(tmp_path).returncode == 0
  text = (tmp_path / "README.md").read_text()
  assert text == EMPTY.format("no.json").replace(
    "<!-- end", "not measured yet\n<!-- end"
  )


def test_check_only_compares(tmp_path):
  write(tmp_path, QUALITY)
  before = (tmp_path / "README.md").read_bytes()
  done = fill(tmp_path, "--check")
  assert done.returncode == 1 and "out of date" in done.stderr
  assert (tmp_path / "README.md").read_bytes() == before
  assert fill(tmp_path).returncode == 0
  assert fill(tmp_path, "--check").returncode == 0


@pytest.mark.parametrize(
  ("readme", "result", "words"),
  [
    ("<!-- table: found.json -->\n", "{}", "has no `<!-- end -->`"),
    (EMPTY.format("found.json"), '{"rows": [', "write it anew"),
    (EMPTY.format("found.json"), '{"rows": [{"op": "x"}]}', "write it anew"),
    (EMPTY.format("found.json"), '{"rows": []}', "write it anew"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, readme, result, words):
  (tmp_path / "README.md").write_text(readme)
  (tmp_path / "found.json").write_text(result)
  done = fill(tmp_path)
  assert done.returncode == 2
  assert words in done.stderr and len(done.stderr.splitlines()) == 1
  assert (tmp_path / "README.md").read_text() == readme
