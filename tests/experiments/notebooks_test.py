"""Notebooks run, with fewer examples, and are small; Jupyter is not needed."""

import json
import pathlib

import matplotlib
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = ROOT / "experiments/notebooks"
# What a cell tagged "parameters" is replaced by.
REDUCED = {
  "regression_lm.ipynb": (
    "TRAIN_ROWS, EPOCHS, TEST_ROWS, DRAWS = 40, 1, 8, 4\n"
    "FEW, TASKS, TASK_EPOCHS = 8, 4, 1\n"
  )
}


def cells(name):
  path = NOTEBOOKS / name
  return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_every_notebook_is_tested_and_small():
  found = {path.name: path.stat().st_size for path in NOTEBOOKS.iterdir()}
  assert found.keys() == REDUCED.keys()
  assert all(size < 100_000 for size in found.values()), found


@pytest.mark.parametrize("name", REDUCED)
def test_what_is_shown_is_of_one_run_without_errors(name):
  code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
  numbers = [cell["execution_count"] for cell in code]
  assert numbers == list(range(1, len(code) + 1))
  kinds = {out["output_type"] for cell in code for out in cell["outputs"]}
  assert kinds <= {"stream", "display_data", "execute_result"}
  assert {out.get("name") for c in code for out in c["outputs"]} <= {
    "stdout",
    None,
  }


@pytest.mark.parametrize("name", REDUCED)
def test_cells_run(name, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  matplotlib.use("agg")
  # Few draws of a model that has learned nothing may all be alike.
  monkeypatch.setattr("scipy.stats.spearmanr", lambda *_: (np.nan, np.nan))
  scope, ran = {}, 0
  for cell in cells(name):
    if cell["cell_type"] == "code":
      tags = cell["metadata"].get("tags", [])
      code = REDUCED[name] if "parameters" in tags else "".join(cell["source"])
      exec(compile(code, f"{name}, cell {ran}", "exec"), scope)
      ran += 1
  assert ran == len([c for c in cells(name) if c["cell_type"] == "code"]) > 6
  assert "the same draws: True" in capsys.readouterr().out
