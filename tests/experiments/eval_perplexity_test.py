"""The script on the shipped model, in a process of its own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.convert import load
from models.text import load_text
from models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "experiments/eval_perplexity.py", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )


def test_perplexity_is_that_of_the_definition(tmp_path):
  path = tmp_path / "result.json"
  done = run("--window=64", "--windows=3", "--batch=2", f"--result={path}")
  assert done.returncode == 0, done.stderr
  checkpoint = load("tiny")
  tokenizer = load_tokenizer(checkpoint)
  ids = tokenizer.encode(load_text("wikitext2:test"))
  count = len(ids) // 63
  nll = []
  for i in range(3):
    start = i * count // 3 * 63
    row = np.concatenate([[tokenizer.bos_id], ids[start : start + 63]])
    logits = np.asarray(
      transformer.forward(
        checkpoint.config, checkpoint.params, jnp.asarray(row)[None]
      )[0],
      np.float64,
    )
    total = np.log(np.exp(logits).sum(-1))
    nll += [total[t] - logits[t, row[t + 1]] for t in range(63)]
  (row,) = json.loads(path.read_text())["rows"]
  assert row["value"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
  assert row["low"] <= row["value"] <= row["high"]
  assert row["windows"] == 3


@pytest.mark.parametrize(
  "flag, parts",
  [
    ("--window=513", ("--window", "512")),
    ("--text=none.txt", ("none.txt",)),
    ("--model=none.gguf", ("none.gguf",)),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(flag, parts):
  done = run(flag)
  assert done.returncode == 2
  (line,) = [s for s in done.stderr.splitlines() if s.startswith("error: ")]
  assert "Traceback" not in done.stderr
  for part in parts:
    assert part in line
