"""The script on the shipped model, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "experiments/generate.py", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=240,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "PYTHONPATH": str(ROOT),
    },
  )


def test_one_prompt_streams_and_speeds_are_told():
  done = run("--prompt=Once upon a time", "--max_tokens=12", "--steps=3")
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("Once upon a time, there was a little")
  assert "prefill 5 tokens" in done.stderr
  assert "decode 11 tokens" in done.stderr
  assert "tokens/s" in done.stderr


def test_several_prompts_from_flags_and_a_file(tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "Lily and"}\n{"prompt": "One day Tom"}\n')
  output = tmp_path / "made/texts.jsonl"
  done = run(
    "--prompt=Once upon a time",
    f"--prompt_file={prompts}",
    "--max_tokens=20",
    "--temperature=0.8",
    "--top_p=0.9",
    "--top_k=50",
    "--seed=3",
    "--stop=a",
    "--stop=\\n",
    f"--output={output}",
  )
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  names = ["Once upon a time", "Lily and", "One day Tom"]
  assert [row["prompt"] for row in rows] == names
  for row in rows:
    assert row["tokens"] <= 20 and "a" not in row["text"]
    assert row["reason"] in ("stop string", "max_tokens", "end token")
    assert f"=== {row['prompt']!r}" in done.stdout


@pytest.mark.parametrize(
  "flags, parts",
  [
    ((), ("--prompt", "--prompt_file")),
    (("--prompt=a", "--max_tokens=600"), ("512", "max_tokens")),
    (("--prompt=a", "--chat"), ("--chat", "im_start")),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, parts):
  done = run(*flags)
  assert done.returncode == 2
  (line,) = [s for s in done.stderr.splitlines() if s.startswith("error: ")]
  assert "Traceback" not in done.stderr
  for part in parts:
    assert part in line
