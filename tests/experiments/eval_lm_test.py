"""The script on the shipped model: in a process of its own, and in this one."""

import json

import jax
import pytest

from models import export, language_model
from models.attamba_config import AttambaConfig
from research.text import tokenizing
from tests.experiments import processes, scripts

STEM = "Once upon a time, there was a little girl named"


def run(*arguments):
  return scripts.run("eval_lm", *arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A few questions of three tasks."""
  folder = tmp_path_factory.mktemp("data")
  passages = [{"text": f"{STEM} {name}"} for name in ("Lily", "Qix")]
  (folder / "lambada_test.jsonl").write_text(
    "".join(json.dumps(passage) + "\n" for passage in passages)
  )
  question = {"goal": "Play", "sol1": "with a ball", "sol2": "qzx", "label": 0}
  (folder / "piqa.json").write_text(json.dumps([question]))
  return folder


def test_a_run_goes_on_with_the_task_that_is_not_done(data, tmp_path):
  workdir, result = tmp_path / "run", tmp_path / "result.json"
  common = (
    f"--data={data}",
    f"--workdir={workdir}",
    "--window=32",
    "--windows=3",
    f"--result={result}",
  )
  script = ["experiments/eval_lm.py"]
  code, _, err = processes.run(tmp_path, script, *common, "--tasks=lambada")
  assert code == 0, err
  first = json.loads(result.read_text())["rows"]
  assert [row["metric"] for row in first] == ["acc", "perplexity"]
  assert first[0]["value"] == 0.5 and first[0]["items"] == 2
  # As a run that was stopped during its second task leaves things.
  code, out, err = run(*common, "--tasks=lambada,piqa,perplexity")
  assert code == 0, err
  assert "lambada: done before" in out
  rows = json.loads(result.read_text())["rows"]
  assert rows[:2] == first
  metrics = [(row["task"], row["metric"]) for row in rows[2:]]
  assert metrics == [
    ("piqa", "acc"),
    ("piqa", "acc_norm"),
    ("perplexity", "perplexity"),
    ("perplexity", "bits_per_byte"),
  ]
  keys = "system model data method budget metric value low high seeds stderr"
  for row in rows:
    assert set(keys.split()) <= row.keys()
    assert row["low"] <= row["value"] <= row["high"]
  assert rows[4]["items"] == 3 and rows[4]["data"] == "wikitext2:test"
  assert "| tiny " in out
  code, _, err = run(*common, "--tasks=lambada", "--dtype=bfloat16")
  assert code == 2 and "--dtype" in err


@pytest.mark.parametrize(
  "flags, parts",
  [
    (("--window=513",), ("--window=513", "512")),
    (("--model=none.gguf",), ("none.gguf",)),
    (("--tasks=piqa",), ("--data",)),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, parts):
  code, _, err = run(*flags)
  assert code == 2
  (line,) = [s for s in err.splitlines() if s.startswith("error: ")]
  assert "Traceback" not in err
  for part in parts:
    assert part in line


def test_an_attamba_with_other_chunks_in_longer_texts(tmp_path):
  config = AttambaConfig.tiny(
    vocab_size=257, vocab_multiple=8, num_layers=1, max_position=16
  )
  params = language_model.init(config, jax.random.key(0))
  export.save(tmp_path / "model", config, params, tokenizing.of_bytes())
  result = tmp_path / "result.json"
  common = (f"--model={tmp_path / 'model'}", "--window=64", "--windows=2")
  code, _, err = run(*common)
  assert code == 2 and "--max_length is 16" in err
  code, _, err = run(
    *common,
    "--max_length=64",
    "--chunk_size=8",
    "--chunk_window=5",
    f"--result={result}",
  )
  assert code == 0, err
  row = json.loads(result.read_text())["rows"][0]
  assert (row["chunk_size"], row["chunk_window"]) == (8, 5)
  # An untrained model knows nothing of 257 tokens.
  assert 200 < row["value"] < 330
  code, _, err = run("--chunk_size=8", "--window=64")
  assert code == 2 and "--chunk_size is for an Attamba" in err
