import csv
import gzip
import json

import numpy as np
import pytest

from models.errors import InputError
from research.regression_lm import error_analysis
from research.regression_lm.kernelbench import (
  cross_validation,
  timings,
)
from research.regression_lm.kernelbench.plan import Plan
from research.regression_lm.options import Options

OPTIONS = Options(
  size="tiny",
  tokenizer="bpe",
  vocab_size=300,
  max_length=64,
  mantissa_digits=2,
  steps=2,
  batch=4,
  expected_value=1.0,
  ranking=1.0,
  dropout=0.1,
  grid=4,
)


@pytest.fixture
def folder(tmp_path):
  """Eight programs in two versions, timed on two machines."""
  sources, timings = [], []
  for i in range(8):
    for version in range(2):
      src = f"s{i}{version}"
      size = 2 ** (i + 2) + version
      code = f"def get_inputs():\n  return [torch.rand({size}, 4)]"
      sources.append({"src": src, "code": code})
      for run in ("fast", "slow"):
        timings.append(
          {"src": src, "level": "level1", "name": f"p{i}", "run": run,
           "hardware": f"GPU {run}", "mode": "torch",
           "mean_ms": size * (1 if run == "fast" else 3)}
        )  # fmt: skip
  with gzip.open(tmp_path / "kernelbench_sources.jsonl.gz", "wt") as file:
    file.write("\n".join(map(json.dumps, sources)))
  with gzip.open(tmp_path / "kernelbench_timings.csv.gz", "wt") as file:
    writer = csv.DictWriter(file, list(timings[0]))
    writer.writeheader()
    writer.writerows(timings)
  return tmp_path


def plan(**changes):
  return Plan(
    **{"options": OPTIONS, "runs": ["fast"], "folds": 2, "members": 1}
    | {"renamings": 1, "made_up": 6, "peers": False}
    | changes
  )


def test_problems_are_held_out_whole(folder):
  found = timings.load(folder, plan())
  assert len(found.ms) == 32 and set(found.fold) == {0, 1}
  folds_of = {}
  for program, fold in zip(found.program, found.fold):
    # Two versions stand behind each other.
    folds_of.setdefault(program // 2, set()).add(fold)
  assert all(len(folds) == 1 for folds in folds_of.values())


def test_a_run_judges_what_was_held_out(folder, tmp_path):
  lines = []
  found = timings.load(folder, plan(members=2, peers=True))
  rows = cross_validation.run(
    plan(members=2, peers=True), found, tmp_path / "run", lines.append,
    tmp_path / "answers.jsonl",
  )  # fmt: skip
  answers = error_analysis.read(tmp_path / "answers.jsonl")
  assert len(answers) == 16 and answers[0]["mean_ms"]["truth"] > 0
  assert {row["group"].split()[1] for row in answers} == {"fast"}
  targets = {row["target"] for row in rows}
  assert targets == {"fast", cross_validation.POOLED}
  methods = {row["method"] for row in rows}
  assert len(methods) == 4
  assert all(row["tests"] == 16 for row in rows)
  assert all(np.isfinite(r["value"]) for r in rows if r["metric"] == "mae")


def test_a_run_that_is_not_there_is_named(folder):
  with pytest.raises(InputError, match="no run 'H100'"):
    timings.load(folder, plan(runs=["H100"]))
  with pytest.raises(InputError, match="no such file"):
    timings.load(folder / "nothing", plan())
