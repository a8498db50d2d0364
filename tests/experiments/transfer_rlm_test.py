"""The script of transfer between tasks, as a user runs it."""

import csv
import json

import pytest

from tests.experiments import scripts
from tests.experiments.processes import ROOT

DATA = ROOT / "data/kernel_tuner/convolution.csv.xz"
SMALL = [
  "--data=kernel_tuner",
  f"--path={DATA}",
  "--sizes=12",
  "--seeds=1",
  "--tests=30",
]
MODEL = [
  "--encoder_layers=1",
  "--d_model=16",
  "--ensemble=2",
  "--views=1",
  "--test_views=1",
  "--steps_root=1",
  "--grid=5",
  "--batch=4",
  # Dropout's draws take long to compile, and nothing here tells of them.
  "--dropout=0",
]


pytestmark = pytest.mark.usefixtures("drawn_leaf_by_leaf")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  return tmp_path_factory.mktemp("transfer")


def run(*arguments):
  return scripts.run("transfer_rlm", *arguments)


def test_settings_come_from_another_target_and_parts_are_joined(home):
  tried = home / "tried.json"
  code, out, err = run(
    *SMALL, *MODEL, "--targets=time_ms_MI250X", "--peers=none",
    f"--workdir={home / 'tried'}", f"--result={tried}",
  )  # fmt: skip
  assert code == 0, err
  assert "score:" in out and "Traceback" not in err
  aimed = [*SMALL, "--targets=time_ms_A100", f"--workdir={home / 'aimed'}"]
  code, _, err = run(
    *aimed, f"--settings_from={tried}", "--peers=none", "--ensemble=1"
  )
  assert code == 0, err
  result = home / "joined.json"
  code, out, err = run(
    *aimed, "--models=none", "--peers=XGBoost", f"--result={result}"
  )
  assert code == 0, err
  found = json.loads(result.read_text())
  methods = {line["method"] for line in found["summary"]}
  assert methods == {"XGBoost", "regression LM, scratch"}
  how = found["models"]["scratch"]
  assert how["settings"]["d_model"] == 16 and how["settings"]["ensemble"] == 1
  assert how["chosen"]["tried"]["tried.json"]["targets"] == ["time_ms_MI250X"]
  # What is tested must not choose.
  code, _, err = run(
    *SMALL, "--targets=time_ms_MI250X", f"--settings_from={tried}"
  )
  assert code == 2 and "must have no say" in err
  assert len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def own(home):
  """Rows of two devices in one table; two rows of H100 have no number."""
  path = home / "own.csv"
  rows = [(device, n, n * (2 if device == "H100" else 3)) for n in range(20)
          for device in ("A100", "H100")]  # fmt: skip
  lines = [
    f"{d};{n};{'' if d == 'H100' and n < 2 else ms},5" for d, n, ms in rows
  ]
  path.write_text("\n".join(["device;n;ms", *lines]).replace(";,5", ";"))
  return path


PRETRAINED = [*MODEL, "--models=pretrained", "--pretrain_steps=2", "--folds=2",
              "--pretrain_batch=4"]  # fmt: skip


def test_few_rows_of_a_users_own_after_many_of_others(home, own):
  table = [f"--path={own}", "--targets=ms", "--decimal=,"]
  tasks = ["--task_column=device", "--new_task=H100"]
  out = home / "predicted.csv"
  code, said, err = run(*table, *tasks, *PRETRAINED, f"--out={out}")
  assert code == 0, err
  assert "target ms_H100: 18 numbers, 4.5 to 38.5" in said
  assert "source ms_A100: 20 numbers, 0.5 to 57.5" in said
  assert "predictions of 2 rows" in said
  rows = list(csv.DictReader(out.read_text().splitlines()))
  assert [(row["device"], row["n"]) for row in rows] == [
    ("H100", "0"),
    ("H100", "1"),
  ]
  for row in rows:
    low, middle, high = (
      float(row[f"ms_H100_{k}"]) for k in ("low", "median", "high")
    )
    assert low <= middle <= high
  code, _, err = run(*table, *tasks, *PRETRAINED, f"--out={out}")
  assert code == 2 and "is not overwritten" in err
  more = ["--data=kernel_tuner", f"--out={home / 'x.csv'}", "--overwrite"]
  code, _, err = run(f"--path={DATA}", "--targets=time_ms_A100", *more)
  assert code == 2 and "--data=csv alone has new rows" in err


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "give --path"),
    (
      [*SMALL, "--targets=time_ms_A100", "--source_paths=experiments/cli.py"],
      "are of --data=csv",
    ),
    (["--path=none.csv", "--targets=a"], "no such file"),
    (["--path=none.csv", "--targets=a", "--models=best"], "'best' is unknown"),
    (["--path=none.csv", "--targets=a", "--d_model=17"], "multiple of 16"),
    (
      ["--path=none.csv", "--targets=a", "--settings_from=none.json"],
      "none.json: is missing: name a result of transfer_rlm.py with",
    ),
  ],
)
def test_mistakes_are_one_line_and_exit_with_2(home, arguments, words):
  code, _, err = run(*arguments)
  assert code == 2 and words in err
  assert len(err.strip().splitlines()) == 1
