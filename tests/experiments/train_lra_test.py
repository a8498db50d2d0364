"""train_lra.py as a user runs it, on short expressions."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from models import fabnet
from research.core import metrics
from research.lra import data as data_lib
from research.lra import training
from research.lra.tasks import TASKS
from research.results import lra
from tests.experiments import scripts
from tests.experiments.processes import ROOT

TRAIN = [
  f"--flagfile={ROOT}/experiments/flagfiles/lra_tiny.flags",
  "--attention_layers=0",
  "--layers=1",
  "--length=24",
  "--examples=512",
  "--d_model=8",
  "--d_ff=16",
  "--batch=16",
  "--steps=50",
  "--warmup=5",
  "--eval_every=20",
  "--seeds=0,1",
  "--learning_rates=1e-6,1e-2",
  "--pretrain_share=0.2",
]
DATA = data_lib.Options(length=24, examples=512)


def run(*flags):
  return scripts.run("train_lra", *flags)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  return tmp_path_factory.mktemp("lra")


@pytest.fixture(scope="module")
def trained(home):
  code, out, err = run(
    *TRAIN, f"--workdir={home / 'run'}", f"--cache={home / 'cache'}"
  )
  assert code == 0, err
  assert "Traceback" not in err and "Warning" not in err
  return home / "run", out


def test_a_run_learns_and_tests_the_better_rate(trained):
  workdir, out = trained
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  # 10 updates restore tokens, 40 learn classes; members are rates by seeds.
  assert [row["updates"] for row in rows] == [20, 40]
  assert np.shape(rows[-1]["valid_accuracy"]) == (4,)
  before = metrics.read_jsonl(workdir / "pretrain" / "metrics.jsonl")
  assert [row["updates"] for row in before] == [10]
  slow, fast = np.reshape(rows[-1]["losses"], (2, 2)).mean(1)
  assert fast < slow
  result = json.loads((workdir / "result.json").read_text())
  assert [row["seed"] for row in result["rows"]] == [0, 1]
  assert {row["learning_rate"] for row in result["rows"]} == {0.01}
  assert result["rows"][0]["data"] == "listops"
  assert "512 sequences to learn from, 512 to validate, 512 to test" in out
  assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
  assert "test accuracy" in (workdir / "report.md").read_text()


def test_a_model_read_again_scores_exactly_as_it_was_told(home, trained):
  workdir, _ = trained
  options = data_lib.Options(length=24, examples=512, cache=str(home / "cache"))
  parts = data_lib.load(TASKS["listops"], options)
  rows = json.loads((workdir / "result.json").read_text())["rows"]
  for row in rows:
    folder = workdir / f"model_{row['seed']}"
    assert training.score(folder, parts.test) == row["value"]
    config, params = fabnet.load(folder)
    assert config.max_length == 24
    assert fabnet.num_params(config) == row["parameters"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_run_that_ended_early_goes_on_to_the_same_numbers(home, trained):
  workdir, _ = trained
  again = home / "again"
  shutil.copytree(workdir, again)
  # As killed before the second round: its checkpoint and models are gone.
  (checkpoint,) = (again / "checkpoints").iterdir()
  shutil.rmtree(checkpoint)
  for path in again.glob("model_*"):
    shutil.rmtree(path)
  code, _, err = run(*TRAIN, f"--workdir={again}", f"--cache={home / 'cache'}")
  assert code == 0, err
  lines = [
    [metrics.without_timing(row) for row in metrics.read_jsonl(path)]
    for path in (workdir / "metrics.jsonl", again / "metrics.jsonl")
  ]
  assert lines[0] == lines[1]
  for name in ("model_0", "model_1"):
    both = [
      (folder / name / "model.safetensors") for folder in (workdir, again)
    ]
    assert both[0].read_bytes() == both[1].read_bytes()


def test_runs_stand_beside_each_other_over_measured_times(home, trained):
  workdir, _ = trained
  times = home / "times.json"
  row = {"model": "ours", "data": "listops", "length": 24, "operations": 1}
  row |= {"multiplications": 7, "sample_ms": 0.5}
  rows = [
    row | {"pass": "update", "batch": 16, "ms": 3.0},
    row | {"pass": "forward", "batch": 1, "ms": 0.5},
    row | {"pass": "update", "batch": 16, "ms": 9.0, "data": "text"},
  ]
  times.write_text(json.dumps({"rows": rows}))
  plot, result = home / "over_time.png", home / "compared.json"
  flags = [f"--runs={workdir},{workdir}", "--names=ours,other"]
  code, out, err = scripts.run(
    "plot_lra", *flags, f"--times={times}", f"--plot={plot}",
    f"--result={result}",
  )  # fmt: skip
  assert code == 0 and "ms an update" in out, err
  ours, other = json.loads(result.read_text())["rows"]
  assert (ours["update_ms"], ours["sample_ms_1"]) == (3.0, 0.5)
  assert "update_ms" not in other and "plot:" in out
  single = json.loads((workdir / "result.json").read_text())["rows"]
  values = [row["value"] for row in single]
  assert ours["values"] == values and ours["value"] == np.mean(values)
  half = 12.71 * np.std(values, ddof=1) / 2**0.5
  assert ours["high"] - ours["value"] == pytest.approx(half)
  assert plot.read_bytes().startswith(b"\x89PNG")
  table = lra.table([ours, other])
  assert "| listops | ours " in table and "ms an update" in table
  code, out, err = scripts.run("plot_lra", *flags, f"--plot={plot}")
  # Columns that no run has are not shown.
  assert code == 0 and "of blocks" in out and "ms an update" not in out, err
  code, _, err = scripts.run("plot_lra", f"--runs={home}")
  assert code == 2 and "holds no result.json" in err


MISTAKES = [
  (["--task=foo"], r"--task=foo: .*listops"),
  (["--task=text"], r"--task=text has no data of its own: .*aclImdb"),
  (["--task=image", "--data=/nowhere"], "/nowhere: no such folder"),
  (["--seeds=0.5"], "--seeds=.*0.5 is no whole number"),
  (["--seeds=1,2,1"], r"--seeds=\[1, 2, 1\]: give each once"),
  (
    ["--steps=4", "--pretrain_share=.9"],
    "--pretrain_share=0.9 of --steps=4 leaves no update",
  ),
  (["--augment"], "--augment is for images, and --task=listops has none"),
  (["--pretrain_share=.5", "--pool=cls"], "--pretrain_share restores a token"),
  (["--layers=1", "--attention_layers=2"], "--attention_layers=2: the model"),
  (
    ["--model=mamba2", "--attention_layers=1"],
    "--attention_layers is for fabnet and fnet",
  ),
  (["--task=pathfinder32", "--length=100"], "--length=100 cuts images of 1024"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_a_mistake_is_one_line(home, flags, message):
  code, _, err = run(*TRAIN, f"--workdir={home / 'bad'}", *flags)
  lines = err.strip().splitlines()
  assert code == 2 and len(lines) == 1, err
  assert lines[0].startswith("error: ")
  assert re.search(message, lines[0])
  assert not (home / "bad").exists()
