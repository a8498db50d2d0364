"""The scripts of regression language models, as a user runs them."""

import csv
import json
import lzma
import subprocess

import numpy as np
import pytest

from research.regression_lm import RegressionLM
from tests.experiments import processes, scripts
from tests.experiments.processes import ROOT

DATA = "data/kernel_tuner/convolution.csv.xz"
SMALL = [
  "--size=tiny",
  "--tokenizer=bytes",
  "--max_length=160",
  "--mantissa_digits=2",
  "--batch=8",
  "--warmup=1",
]

pytestmark = pytest.mark.usefixtures("drawn_leaf_by_leaf")
MESSY = ["--data=csv", "--path=HOME/messy.csv", "--targets=loss"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  return tmp_path_factory.mktemp("rlm_scripts")


def train(home, *arguments):
  """In a process of its own, as users do; the others share this one."""
  return processes.run(
    home,
    ["experiments/train_rlm.py"],
    "--flagfile=experiments/flagfiles/rlm_tiny.flags",
    *SMALL,
    "--steps=6",
    "--early_stopping=3",
    "--eval_every=3",
    "--checkpoint_every=3",
    "--log_every=1",
    "--train=60",
    "--valid=16",
    *arguments,
  )


@pytest.fixture(scope="module")
def trained(home):
  code, out, err = train(home, f"--workdir={home / 'run'}")
  assert code == 0, err
  assert "Traceback" not in err and "Warning" not in err
  assert "model:" in out
  return home / "run"


def test_the_tiny_flagfile_trains_a_model_that_can_be_read(trained):
  lm = RegressionLM.from_pretrained(trained / "model")
  assert lm.num_objectives == 2
  assert lm.info["data"]["targets"] == ["time_ms_A100", "time_ms_MI250X"]
  rows = (trained / "metrics.jsonl").read_text().splitlines()
  assert len(rows) == 6
  assert np.isfinite(lm.sample(["block_size_x: 16"], 3)).all()


def test_evaluation_stands_beside_its_peers(home, trained):
  result = home / "result.json"
  arguments = [
    f"--model={trained / 'model'}",
    "--samples=8",
    "--limit=40",
    "--bootstrap=20",
    "--noany_number",
    f"--result={result}",
  ]
  code, out, err = scripts.run("eval_rlm", f"--path={DATA}", *arguments)
  assert code == 0, err
  for name in ("regression LM", "ridge on TF-IDF", "XGBoost", "MLP"):
    assert name in out
  # What is learned from is told first.
  assert "60 for training, 16 for validation" in out
  assert "peers: block_size_x, " in out
  assert "coverage of 0.9, calibrated" in out
  rows = json.loads(result.read_text())["rows"]
  assert {row["target"] for row in rows} == {"time_ms_A100", "time_ms_MI250X"}
  assert all(row["tests"] == 40 and row["train"] == 76 for row in rows)
  # The same with peers that were trained beforehand, and answers to analyse.
  kept = [f"--peers_dir={home / 'peers'}", f"--path={DATA}"]
  code, out, err = scripts.run(
    "eval_rlm", "--model=none", "--limit=40", "--processes=2", *kept,
    *split_of(rows),
  )  # fmt: skip
  assert code == 0 and "6 answers of peers" in out, err
  answers = home / "answers.jsonl"
  code, out, err = scripts.run(
    "eval_rlm", *kept, *arguments, f"--answers={answers}"
  )
  assert code == 0, err
  assert len(list((home / "peers").iterdir())) == 6  # none was trained again
  again = json.loads(result.read_text())
  assert again["rows"] == rows and "--answers=answers" in again["command"]
  code, out, err = scripts.run("analyse_rlm", f"--answers={answers}")
  assert code == 0 and "share_of_rank_error" in out, err
  other = home / "other.csv"
  other.write_text("a,time_ms_A100,time_ms_MI250X\n" + "1,2,3\n" * 100)
  code, _, err = scripts.run("eval_rlm", f"--path={other}", *arguments)
  assert code == 2 and "are not those of the model" in err
  assert len(err.strip().splitlines()) == 1


def test_new_rows_are_predicted(home, trained):
  described = json.loads((trained / "model/config.json").read_text())
  columns = [column["name"] for column in described["info"]["columns"]]
  assert columns[0] == "block_size_x" and "time_ms_A100" not in columns
  heading, first, *_ = lzma.open(ROOT / DATA, "rt").read().splitlines()
  given = dict(zip(heading.split(","), first.split(",")))
  new, out = home / "new.csv", home / "predicted.csv"
  names = [*reversed(columns), "who"]
  row = ",".join([given.get(name, "me") for name in names])
  new.write_text(f"{','.join(names)}\n{row}\n{row}\n")
  arguments = [f"--model={trained / 'model'}", f"--path={new}", "--samples=4"]
  arguments += ["--leave_out=none", "--columns="]
  code, said, err = scripts.run("predict_rlm", *arguments, f"--out={out}")
  assert code == 0, err
  assert "not read, as the model was trained without: who" in said
  text = ", ".join(f"{name}: {given[name]}" for name in columns)
  assert f"text: {text[:160]}" in said and "predictions of 2 rows" in said
  rows = list(csv.DictReader(out.read_text().splitlines()))
  for end in ("low", "median", "high"):
    assert all(float(row[f"time_ms_MI250X_{end}"]) > 0 for row in rows)
  assert [row["who"] for row in rows] == ["me", "me"]
  # The file is not written over, unless a flag says so.
  code, _, err = scripts.run("predict_rlm", *arguments, f"--out={out}")
  assert code == 2 and "is not overwritten" in err
  more = ["--overwrite", "--draws", "--batch=1", "--keep=who", "--any_number"]
  more += [f"--calibrate_on={ROOT / DATA}", "--any_cell", "--dtype=float32"]
  more += ["--seed=1", "--temperature=1", "--top_p=1", "--level=0.8"]
  code, _, err = scripts.run("predict_rlm", *arguments, *more, f"--out={out}")
  assert code == 0, err
  wider = list(csv.DictReader(out.read_text().splitlines()))
  assert len(wider[0]) == 9 and len(wider[0]["time_ms_A100_draws"].split()) == 4
  for words, change in [
    ("has no column block_size_y", ("block_size_y", "size")),
    ("name what stands between the columns with --delimiter", (",", ":")),
    ("a missing value, which training never saw", (row, "nan" + row[2:])),
  ]:
    new.write_text(f"{','.join(names)}\n{row}\n".replace(*change))
    path = home / "none.csv"
    code, _, err = scripts.run("predict_rlm", *arguments, f"--out={path}")
    assert code == 2 and words in err and not path.exists()
    assert len(err.strip().splitlines()) == 1, err


def pasted(home, script):
  """Arguments of the page's command for one's own table, with files in home."""
  page = (ROOT / "docs/regression_lm.md").read_text()
  page = page.partition("## Your own table")[2].partition("\n## ")[0]
  text = page.replace("\\\n", " ").partition(f"experiments/{script}.py ")[2]
  for name in ("runs.csv", "new.csv", "predicted.csv", "runs/mine"):
    text = text.replace(f"={name}", f"={home / name}")
  return text.partition("\n")[0].split()


def test_the_commands_for_a_table_of_ones_own(tmp_path):
  page = (ROOT / "docs/regression_lm.md").read_text()
  makes = [line for line in page.splitlines() if line.startswith("xzcat ")]
  for line in makes:
    line = line.replace(" data/", f" {ROOT}/data/")
    subprocess.run(line, shell=True, check=True, cwd=tmp_path)
  assert len(makes) == 2
  # What is said is pasted, and then made small.
  small = [*SMALL, "--steps=1", "--test=20", "--valid=12", "--train=30"]
  words = ["experiments/train_rlm.py", *pasted(tmp_path, "train_rlm"), *small]
  code, out, err = processes.run(tmp_path, words)
  assert code == 0 and "30 for training, 12 for validation" in out, err
  code, out, err = scripts.run(
    "eval_rlm", *pasted(tmp_path, "eval_rlm"), "--peers=ridge on TF-IDF",
    "--samples=4", "--bootstrap=10",
  )  # fmt: skip
  assert code == 0 and "regression LM" in out, err
  words = [*pasted(tmp_path, "predict_rlm"), "--samples=4"]
  code, out, err = scripts.run("predict_rlm", *words)
  assert code == 0 and "predictions of 10 rows" in out, err
  lines = (tmp_path / "predicted.csv").read_text().splitlines()
  assert lines[0].endswith(
    ",filter_width,time_ms_A100_median,time_ms_A100_low,time_ms_A100_high"
  )
  assert len(lines) == 11 and all(line.count(",") == 12 for line in lines)


def split_of(rows):
  """Flags of the data that the model was trained with."""
  targets = dict.fromkeys(row["target"] for row in rows)
  return ["--data=csv", "--train=60", "--valid=16",
          f"--targets={','.join(targets)}"]  # fmt: skip


def test_a_learning_curve_keeps_what_is_done(home):
  arguments = [
    "--data=kernel_tuner",
    f"--path={ROOT / DATA}",
    "--targets=time_ms_A100",
    *SMALL,
    f"--workdir={home / 'curve'}",
    "--sizes=12,16",
    "--seeds=1",
    "--tests=30",
    "--epochs=2",
    "--samples=4",
    "--ensemble=2",
    "--peers=XGBoost",
    f"--result={home / 'curve.json'}",
  ]
  code, out, err = scripts.run("learning_curve_rlm", *arguments)
  assert code == 0, err
  first = json.loads((home / "curve.json").read_text())
  assert {row["train"] for row in first["rows"]} == {12, 16}
  # The place of the data on this machine is nobody's business.
  assert "--path=data/kernel_tuner/convolution.csv.xz " in first["command"]
  assert "12 examples, seed 0: Kendall's tau regression LM" in out
  (home / "curve/16-0.json").unlink()
  code, _, err = scripts.run("learning_curve_rlm", *arguments)
  assert code == 0, err
  assert json.loads((home / "curve.json").read_text())["rows"] == first["rows"]


@pytest.mark.parametrize(
  "script, arguments, words",
  [
    ("train_rlm", ["--data=csv"], "needs --path"),
    ("train_rlm", ["--data=csv", "--path=none.csv"], "no such file"),
    ("train_rlm", ["--size=huge"], "--size=huge"),
    ("train_rlm", ["--numbers=p10", "--mantissa_digits=40"], "digits=40"),
    ("eval_rlm", ["--model=nowhere"], "is missing"),
    ("eval_rlm", ["--model=none"], "for --peers_dir"),
    ("predict_rlm", [], "--path: give the file of the rows"),
    ("predict_rlm", ["--path=none.csv"], "none.csv: no such file"),
    (
      "predict_rlm",
      ["--path=README.md", "--model=nowhere"],
      "is missing: give",
    ),
    ("predict_rlm", ["--path=README.md", "--delimiter=;;"], "give one char"),
    ("analyse_rlm", [], "--answers: give"),
    ("learning_curve_rlm", ["--data=csv"], "needs --path of its file"),
    ("train_rlm", [*MESSY, "--delimiter=;;"], "--delimiter=;;: give one"),
    (
      "train_rlm",
      [*MESSY],
      "line 2: lr is '0,1': give --decimal=,",
    ),
    ("train_rlm", [*MESSY, "--decimal=,"], "line 5: loss is 'oom'"),
    (
      "train_rlm",
      [*MESSY, "--decimal=,", "--missing=oom", "--leave_out=lr", "--columns=k"],
      "has no column 'k'",
    ),
    (
      "train_rlm",
      [*MESSY, "--decimal=,", "--missing=oom", "--leave_out=lr"],
      "has no column beside loss",
    ),
  ],
)
def test_mistakes_are_one_line_and_exit_with_2(home, script, arguments, words):
  (home / "messy.csv").write_text("lr;loss\n0,1;0,9\n0,2;0,8\n\n0,3;oom\n")
  has_place = script in ("train_rlm", "learning_curve_rlm")
  place = [f"--workdir={home / 'x'}"] if has_place else []
  arguments = [word.replace("HOME", str(home)) for word in arguments]
  code, _, err = scripts.run(script, *place, *arguments)
  assert code == 2 and words in err
  assert len(err.strip().splitlines()) == 1, err
