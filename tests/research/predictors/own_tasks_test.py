"""A user's own tables as tasks."""

import numpy as np
import pytest

from models.errors import InputError
from research.predictors import own_tasks
from research.predictors.own_tasks import FORM, Where
from research.predictors.tables import Layout

NEW = "opt,lr,ms,note\nadam,0.10,5,a\nsgd,0.2,,b\nsgd,,7,c\n"
OLD = "lr,opt,ms,extra\n0.1,adam,50,x\n0.3,lion,NA,y\n"
LONG = (
  "device,lr,ms\nA-100,0.1,1\nH 100,0.1,3\nA-100,0.2,2\nH 100,0.2,\nTPU,0.1,9\n"
)


@pytest.fixture
def folder(tmp_path):
  for name, text in (("new", NEW), ("old", OLD), ("long", LONG)):
    (tmp_path / f"{name}.csv").write_text(text)
  return tmp_path


def read(folder, name="new", **where):
  options = {"targets": ["ms"], "path": folder / f"{name}.csv"} | where
  return own_tasks.read(Where(**options))


def test_rows_of_an_older_table_are_a_source(folder):
  layout = Layout(leave_out=("note",))
  own = read(folder, source_paths=[folder / "old.csv"], layout=layout)
  assert own.targets == ["ms"] and own.sources == ["ms_old"]
  columns = own.facts.columns
  np.testing.assert_array_equal(columns["ms"], [5, np.nan, 7, np.nan, np.nan])
  np.testing.assert_array_equal(columns["ms_old"], [np.nan] * 3 + [50, np.nan])
  assert own.is_new.tolist() == [True] * 3 + [False] * 2
  # Texts of both are written of the new table's columns; gaps are left out.
  assert own.facts.forms[FORM] == [
    ["opt: adam", "lr: 0.10"], ["opt: sgd", "lr: 0.2"], ["opt: sgd"],
    ["opt: adam", "lr: 0.1"], ["opt: lion", "lr: 0.3"],
  ]  # fmt: skip
  assert own.facts.features[FORM].shape == (5, 4)
  assert own.summary() == [
    "target ms: 2 numbers, 5 to 7",
    "source ms_old: 1 numbers, 50 to 50",
    "text: opt: adam ; lr: 0.10",
  ]
  assert (
    own.digest()
    == read(folder, source_paths=[folder / "old.csv"], layout=layout).digest()
  )


def test_a_column_says_of_which_task_a_row_is(folder):
  own = read(folder, "long", task_column="device", new_task="H 100")
  assert own.targets == ["ms_H_100"] and own.sources == ["ms_A_100", "ms_TPU"]
  columns = own.facts.columns
  np.testing.assert_array_equal(columns["ms_H_100"][own.is_new], [3, np.nan])
  assert sorted(columns["ms_A_100"][2:4]) == [1, 2]
  assert own.facts.forms[FORM][0] == ["lr: 0.1"]


def test_columns_of_the_same_rows_are_sources(folder):
  (folder / "both.csv").write_text("lr,a_ms,b_ms,c_ms\n1,2,3,4\n2,3,4,\n")
  own = read(folder, "both", targets=["a_ms"], sources=["*_ms"])
  assert own.targets == ["a_ms"] and own.sources == ["b_ms", "c_ms"]
  assert own.facts.forms[FORM] == [["lr: 1"], ["lr: 2"]] and own.is_new.all()


def test_a_text_stands_behind_the_columns_that_are_named(folder):
  (folder / "a.jsonl").write_text(
    '{"code": "x = 1", "lr": 0.50, "us": 3}\n'
    '{"code": "y = 2", "lr": 0.25, "us": null}\n'
  )
  layout = Layout(text="code", columns=("lr",))
  own = own_tasks.read(
    Where(path=folder / "a.jsonl", targets=["us"], layout=layout)
  )
  assert own.facts.forms[FORM] == [["lr: 0.50", "x = 1"], ["lr: 0.25", "y = 2"]]


@pytest.mark.parametrize(
  ("where", "words"),
  [
    ({"targets": ["us"]}, "has no target 'us', but opt, lr, ms, note: mend"),
    ({"sources": ["us_*"]}, "--sources=us_.: there is no such column, but opt"),
    ({"layout": Layout(columns=("x",))}, "has no column 'x', but .*--columns"),
    ({"layout": Layout(leave_out=("opt", "lr", "note"))}, "no column beside"),
    ({"task_column": "opt"}, "--task_column: give --new_task"),
    ({"task_column": "gpu", "new_task": "x"}, "line 2: has no column 'gpu'"),
    ({"task_column": "opt", "new_task": "x"}, "opt is nowhere .x., but adam"),
    (
      {"task_column": "opt", "new_task": "sgd", "source_paths": ["a.csv"]},
      "give one of them",
    ),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(folder, where, words):
  with pytest.raises(InputError, match=words) as caught:
    read(folder, **where)
  assert "\n" not in str(caught.value)


def test_a_source_without_the_numbers_is_named(folder):
  (folder / "none.csv").write_text("lr,opt\n1,a\n")
  paths = [folder / "old.csv", folder / "none.csv"]
  with pytest.raises(InputError, match="none.csv: has none of the columns ms"):
    read(folder, source_paths=paths)
