import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from models.errors import InputError
from research.language_model import curves
from research.results import training


@pytest.fixture
def run(tmp_path):
  """Three evaluations; the first line's time is that of compilation."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  rows = [
    {"step": 0, "loss": 5.0, "step_seconds": 90.0, "tokens_per_second": 1.0},
    {"step": 4, "step_seconds": 0.5, "eval_loss": 3.0, "tokens": 500},
    {"step": 9, "step_seconds": 0.4, "eval_loss": 2.0, "tokens": 1000},
    {"step": 10, "step_seconds": 0.6, "loss": 2.2},
    {"step": 14, "step_seconds": 0.2, "eval_loss": 1.0, "tokens": 1500},
  ]
  for row in rows[1:]:
    row |= {"tokens_per_second": 100 / row["step_seconds"], "mfu": 0.25}
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (workdir / "metrics.jsonl").write_text(text)
  flags = {"arch": "mamba2", "text": ["a"], "eval_text": ["/d/b", "c"]}
  (workdir / "flags.json").write_text(json.dumps(flags))
  return workdir


def test_a_curve_leaves_out_compilation(run):
  found = curves.read(run, "ours")
  np.testing.assert_array_equal(found.tokens, [500, 1000, 1500])
  np.testing.assert_allclose(found.seconds, [2.0, 4.0, 4.0 + 0.6 + 0.8])
  np.testing.assert_array_equal(found.loss, [3, 2, 1])
  assert found.tokens_per_second == pytest.approx((200 + 250) / 2)
  assert found.mfu == 0.25


def test_rows_tell_the_last_evaluation(run):
  (row,) = curves.rows([curves.read(run, "ours")])
  assert row["value"] == pytest.approx(np.e)
  assert row["budget"] == 1500 and row["data"] == "b,c"
  assert (row["model"], row["method"]) == ("ours", "mamba2")
  json.dumps(row)


def test_runs_say_where_they_were_made(run):
  unfinished = curves.read(run, "unfinished")
  assert unfinished.origin == {}
  result = {"device": "GPU x1", "commit": "c", "versions": {}, "rows": []}
  (run / "result.json").write_text(json.dumps(result))
  finished = curves.read(run, "finished")
  assert curves.shared_origin([finished, finished])["device"] == "GPU x1"
  assert curves.shared_origin([finished, unfinished]) == {}
  moved = {"commit": "b" * 40}
  later = dataclasses.replace(finished, origin=finished.origin | moved)
  both = f"{finished.origin['commit']}, {'b' * 40}"
  assert curves.shared_origin([finished, later])["commit"] == both
  elsewhere = dataclasses.replace(
    finished, origin=finished.origin | {"device": "TPU x1"}
  )
  assert curves.shared_origin([finished, elsewhere]) == {}


def test_runs_are_drawn_on_one_plot(run, tmp_path):
  found = [curves.read(run, name) for name in ("a", "b")]
  curves.plot(tmp_path / "p.png", found, "Title")
  assert matplotlib.image.imread(tmp_path / "p.png").shape[1] == 1120


def test_runs_of_one_name_are_seeds(run, tmp_path):
  first = curves.read(run, "ours")
  second, third = (
    dataclasses.replace(
      first, loss=first.loss + shift, flags=first.flags | {"seed": seed}
    )
    for seed, shift in ((1, 0.2), (2, -0.1))
  )
  alone = dataclasses.replace(first, name="other")
  row, other = curves.rows([first, second, alone, third])
  found = np.exp(1 + np.array([0.0, 0.2, -0.1]))
  assert row["value"] == pytest.approx(found.mean())
  assert row["sd"] == pytest.approx(found.std(ddof=1))
  assert (row["low"], row["high"]) == (min(found), max(found))
  assert row["seeds"] == 3 and other["seeds"] == 1 and other["sd"] is None
  line = training.table([row]).splitlines()[2]
  assert f"{found.mean():.2f} ± {found.std(ddof=1):.2f}" in line

  (untimed,) = curves.rows([first, second], times=False)
  assert untimed["seconds"] is untimed["tokens_per_second"] is None
  text = training.table([untimed])
  assert "tokens/s" not in text and "MFU" not in text
  curves.plot(tmp_path / "p.png", [first, second], "Title", times=False)
  assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_differ_in_their_seed_alone(run):
  first = curves.read(run, "ours")
  with pytest.raises(InputError, match="'ours' names two runs of one seed"):
    curves.rows([first, first])
  other = {"seed": 1, "batch": 2}
  other = dataclasses.replace(first, flags=first.flags | other)
  with pytest.raises(InputError, match="differ in batch: give them names"):
    curves.rows([first, other])


def test_a_run_of_one_line_is_a_point(run):
  lines = (run / "metrics.jsonl").read_text().splitlines()
  (run / "metrics.jsonl").write_text(lines[1] + "\n")
  found = curves.read(run, "short")
  np.testing.assert_array_equal(found.tokens, [500])


def test_a_folder_without_evaluations_is_told(tmp_path):
  with pytest.raises(InputError, match="holds no evaluation"):
    curves.read(tmp_path, "none")


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("flags.json", "[" * 3000),
    ("flags.json", "[]"),
    ("result.json", '{"device": 1}'),
    ("result.json", '"\\ud8'),
    ("metrics.jsonl", '{"step": 1, "eval_loss": 2}\n'),
    ("metrics.jsonl", '{"step": [], "eval_loss": 2, "step_seconds": 1}\n'),
  ],
)
def test_damaged_files_of_a_run_are_one_line(run, name, text):
  (run / name).write_text(text)
  with pytest.raises(InputError, match=f"{name}: is damaged: train"):
    curves.read(run, "ours")
