"""The script that measures programs, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments):
  script = [sys.executable, "experiments/make_program_metrics.py", *arguments]
  return subprocess.Popen(
    # Tests in the background of a shell inherit that Ctrl-C is ignored.
    ["env", "--default-signal=INT", *script],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(ROOT),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*arguments):
  process = start(*arguments)
  out, err = process.communicate(timeout=240)
  return process.returncode, out, err


def test_interrupted_it_goes_on_and_writes_the_set(tmp_path):
  output, result = tmp_path / "p.jsonl", tmp_path / "r.json"
  arguments = [
    "--count=32",
    "--repeats=2",
    "--again=0.1",
    "--views=typed",
    f"--workdir={tmp_path / 'w'}",
    f"--output={output}",
    f"--result={result}",
  ]
  process = start(*arguments)
  first = tmp_path / "w/programs/000000.json"
  until = time.monotonic() + 120
  while not first.exists() and time.monotonic() < until:
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130 and "interrupted" in err
  before = first.stat().st_mtime_ns
  code, out, err = run(*arguments)
  assert code == 0, err
  assert first.stat().st_mtime_ns == before
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  found = json.loads(result.read_text())
  assert all("typed" in row and "source" not in row for row in rows)
  assert [row["index"] for row in rows] == list(range(32))
  assert found["programs"] == 32 and found["duplicates"] == 0
  assert found["machine"]["backend"] == "cpu"
  assert sum(found["parts"]["sizes"].values()) == 32
  twice = [row for row in rows if row["latency_process_us"] is not None]
  assert len(twice) == found["ceilings"]["process_programs"] > 0
  assert "32 programs; 0 failed, 0 duplicates" in out
  code, _, err = run(*arguments, "--seed=1")
  assert code == 2 and "--seed is 1" in err


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "--output: give the file"),
    (["--output=a.csv"], "is not named .jsonl"),
    (["--output=a.jsonl", "--workers=4000"], "each needs its own"),
    (["--output=a.jsonl", "--count=0"], "--count"),
    (["--output=a.jsonl", "--views=hlo"], "--views=hlo: take some of"),
  ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words):
  code, _, err = run(f"--workdir={tmp_path}", *arguments)
  assert code == 2 and words in err
  assert len(err.strip().splitlines()) == 1
