"""Rows without targets, as the texts of training.

Their tables are those that users brought: see the names of the tests.
"""

import json

import numpy as np
import pytest

from models.errors import InputError
from research.predictors import new_rows, seen, tables
from research.predictors.seen import Column
from research.predictors.tables import Layout

TRAINED = Layout()
COLUMNS = [
  Column(name="lr", low=0.1, high=0.4),
  Column(name="depth", low=2.0, high=8.0),
]


def read(tmp_path, content, name="new.csv", given=Layout(), **changes):  # noqa: B008
  path = tmp_path / name
  path.write_text(content)
  options = {"targets": ["acc"], "trained": TRAINED, "columns": COLUMNS}
  options |= changes
  targets, trained = options.pop("targets"), options.pop("trained")
  columns = options.pop("columns")
  return new_rows.read(path, targets, trained, columns, given, **options)


WRITTEN = ["lr: 0.1, depth: 3", "lr: 0.2, depth: 4"]


@pytest.mark.parametrize(
  "name, content",
  [
    ("new.csv", "lr,depth,acc\n0.1,3,\n0.2,4,\n"),
    ("new_without.csv", "lr,depth\n0.1,3\n0.2,4\n"),
    ("partly.csv", "lr,depth,acc\n0.1,3,0.5\n0.2,4,NA\n"),
    ("other_order.csv", "acc,depth,lr\n,3,0.1\n,4,0.2\n"),
    ("spaces.csv", "lr, depth\n0.1, 3\n0.2, 4\n"),
    ("mark.csv", "\ufefflr,depth\n0.1,3\n0.2,4\n"),
    ("quoted.csv", '\ufeff"lr","depth"\n"0.1","3"\n"0.2","4"\n'),
    ("index.csv", ",lr,depth\n0,0.1,3\n1,0.2,4\n"),
    ("comment.csv", "# of May\nlr,depth\n0.1,3\n0.2,4\n"),
    ("trailing.csv", "lr,depth\n0.1,3,\n0.2,4,\n"),
    ("tabs.tsv", "lr\tdepth\n0.1\t3\n0.2\t4\n"),
    ("semicolons.csv", "lr;depth\n0.1;3\n0.2;4\n"),
    ("a.jsonl", '{"lr": 0.1, "depth": 3}\n{"depth": 4, "lr": "0.2"}\n'),
    ("b.txt", '{"lr": 0.1, "depth": 3, "acc": null}\n{"depth":4,"lr":0.2}\n'),
  ],
)
def test_texts_are_written_as_in_training(tmp_path, name, content):
  found = read(tmp_path, content, name)
  assert found.texts == WRITTEN and len(found) == 2
  assert not found.notes


def test_digits_stay_as_they_are_written(tmp_path):
  found = read(tmp_path, '{"lr": 1.50e-1, "depth": 3.0}\n', "a.jsonl")
  assert found.texts == ["lr: 1.50e-1, depth: 3.0"]


def test_decimal_commas_become_the_points_of_training(tmp_path):
  content = "lr;depth\n0,1;3\n0,2;4\n"
  found = read(tmp_path, content, given=Layout(decimal=","))
  assert found.texts == WRITTEN
  # A model of decimal commas reads points likewise, and commas without a flag.
  trained = Layout(decimal=",")
  commas = ["lr: 0,1, depth: 3", "lr: 0,2, depth: 4"]
  assert read(tmp_path, content, trained=trained).texts == commas
  points = "lr,depth\n0.1,3\n0.2,4\n"
  found = read(tmp_path, points, trained=trained, given=Layout(decimal="."))
  assert found.texts == commas


@pytest.mark.parametrize(
  "content, words",
  [
    ("lr,acc\n0.1,\n", "has no column depth, which the model reads, but lr, a"),
    ("acc\n1\n", "has no column lr, depth, which"),
    ("lr:depth\n0.1:3\n", "name what stands between the columns with --delim"),
    ("lr;depth\n0,1;3\n", "line 2: lr is '0,1': give --decimal=,"),
    ("lr,depth\n0.1,3\n0.2,nan\n", "line 3: depth is 'nan', a missing value,"),
    ("lr,depth\n0.1,3\n,4\n", "line 3: lr is '', a missing value, which trai"),
    ("lr,depth\n0.1,deep\n", "line 2: depth is 'deep', no number, as all of"),
    ("lr,depth\n0.1,3\n0.2\n", "line 3: has 1 cells, the heading 2"),
    ("lr,lr,depth\n1,2,3\n", "two columns are named 'lr'"),
    ("lr,depth\n", "has no row below its heading"),
    ("", "has no row below its heading"),
    ('{"lr": 0.1, "depth": 3}\n{"lr": 0.1}\n', "line 2: has no column depth"),
    ('{"lr": [1], "depth": 3}\n', r"line 1: lr is .*: write a number or a st"),
    ('{"lr": 0.1, "depth": null}\n', "line 1: depth is '', a missing value"),
    ('{"lr": NaN, "depth": 3}\n', "line 1: lr is 'NaN', a missing value"),
    ('{"lr": 0.1, "lr": 0.2, "depth": 3}\n', "line 1: has 'lr' twice"),
    ('{"lr": 0.1, "depth": 3}\n{"lr"\n', "line 2: is no JSON object"),
  ],
)
def test_mistakes_are_one_line(tmp_path, content, words):
  with pytest.raises(InputError, match=words) as caught:
    read(tmp_path, content)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n", "[]\n", '[{"lr": 1}]\n'])
def test_a_file_of_json_without_lines(tmp_path, content):
  with pytest.raises(InputError, match="has no row|is no JSON object: give J"):
    read(tmp_path, content, "a.jsonl")


def test_the_wrong_mark_of_decimals_is_told(tmp_path):
  with pytest.raises(InputError, match="is '0.1', no number.*--decimal=[.]"):
    read(tmp_path, "lr,depth\n0.1,3\n", trained=Layout(decimal=","))
  with pytest.raises(InputError, match="is '0,1', no number.*--decimal=,"):
    read(tmp_path, "lr;depth\n0,1;3\n", given=Layout(decimal="."))


def test_mistakes_are_taken_where_a_flag_says_so(tmp_path):
  content = "lr,depth\n0.1,nan\n0.2,deep\n"
  found = read(tmp_path, content, any_cell=True)
  assert found.texts == ["lr: 0.1, depth: nan", "lr: 0.2, depth: deep"]
  assert [note.partition(":")[0] for note in found.notes] == ["depth", "depth"]


def test_what_training_never_saw_is_told(tmp_path):
  columns = [
    Column(name="optimizer", words=("adam", "sgd")),
    Column(name="lr", low=0.1, high=0.4),
    Column(name="id", words=None),
  ]
  content = "lr,optimizer,id,seed\n0.1,adam,a7,0\n3,lion,b9,0\n"
  found = read(tmp_path, content, columns=columns)
  assert found.texts[1] == "optimizer: lion, lr: 3, id: b9"
  optimizer, rate, more = found.notes
  assert "1 of 2 rows are a word that training never" in optimizer
  assert "(adam, sgd), first 'lion'" in optimizer and "line 3" in optimizer
  assert "outside of what training saw (0.1 to 0.4), first '3'" in rate
  assert more == "not read, as the model was trained without: seed"
  # What is named is left out without a word.
  given = Layout(leave_out=("seed", "nothing"))
  assert len(read(tmp_path, content, columns=columns, given=given).notes) == 2


def test_booleans_are_spelled_as_training_did(tmp_path):
  for words, spelled in [(("false", "true"), "true"), (("no",), "True")]:
    columns = [Column(name="lr", words=words)]
    found = read(tmp_path, '{"lr": true}\n', "a.jsonl", columns=columns)
    assert found.texts == [f"lr: {spelled}"]


def test_a_column_of_texts(tmp_path):
  trained = Layout(text="x")
  options = {"trained": trained, "columns": None}
  jsonl = '{"x": "a\\nb", "size": 1.50}\n{"x": "c"}\n'
  found = read(tmp_path, jsonl, "a.jsonl", **options)
  assert found.texts == ["a\nb", "c"] and found.names == ["x", "size"]
  csv = 'code,size\n"a\nb",1\nc,2\n'
  found = read(tmp_path, csv, given=Layout(text="code"), **options)
  assert found.texts == ["a\nb", "c"]
  for content, words in [
    (csv, "has no column x, which the model reads, but code, size: name the"),
    ("x,y\na,1\n ,2\n", "line 3: its text is empty"),
    ('{"x": 3}\n', "line 1: x is 3, which is no text"),
  ]:
    with pytest.raises(InputError, match=words):
      read(tmp_path, content, **options)


def test_columns_in_front_of_a_text(tmp_path):
  options = {"trained": Layout(text="code", columns=("lr", "depth"))}
  for content, name in [
    ('depth,code,lr,who\n3,"a\nb",0.1,me\n', "new.csv"),
    ('{"lr": 0.1, "depth": 3, "code": "a\\nb", "who": 1}', "new.jsonl"),
  ]:
    found = read(tmp_path, content, name, **options)
    assert found.texts == ["lr: 0.1, depth: 3\na\nb"]
    assert found.notes == ["not read, as the model was trained without: who"]
  given = Layout(text="source", columns=("depth", "source", "lr"))
  content = "lr,depth,source\n0.2,4,c\n"
  found = read(tmp_path, content, given=given, **options)
  assert found.texts == ["lr: 0.2, depth: 4\nc"]
  for content, words in [
    ("lr,code\n1,a\n", "has no column depth, which the model reads"),
    ("lr,depth\n1,2\n", "has no column code, which the model reads"),
    ("lr,depth,code\n,2,a\n", "lr is '', a missing value, which training"),
  ]:
    with pytest.raises(InputError, match=words):
      read(tmp_path, content, **options)


def test_a_model_that_kept_no_columns(tmp_path):
  """Models of before know the flags of their training alone."""
  content = "lr,depth,acc,test_acc\n0.1,3,,\n"
  found = read(
    tmp_path, content, columns=None, trained=Layout(leave_out=("test_acc",))
  )
  assert found.texts == ["lr: 0.1, depth: 3"]
  given = Layout(columns=("depth", "lr"))
  found = read(tmp_path, content, columns=None, given=given)
  assert found.texts == ["depth: 3, lr: 0.1"]
  with pytest.raises(InputError, match="no column beside acc to predict from"):
    read(tmp_path, "acc\n1\n", columns=None)
  with pytest.raises(InputError, match="--columns=seed: the model reads lr, d"):
    read(tmp_path, content, given=Layout(columns=("seed",)))


CSV = """optimizer,lr,depth,run,acc
adam,0.1,3,a,1
sgd,auto,4,b,2
lion,0.4,,c,3
"""


def test_what_the_training_rows_show_of_columns(tmp_path):
  (tmp_path / "runs.csv").write_text(CSV)
  table = tables.read_csv(tmp_path / "runs.csv", ["acc"])
  found = seen.columns(table, np.array([0, 1]))
  # Three words of three rows are names, of which nothing is kept.
  assert found == [
    Column(name="optimizer", words=None, gaps=True),
    Column(name="lr", low=0.1, high=0.1, words=("auto",)),
    Column(name="depth", low=3.0, high=4.0),
    Column(name="run", words=None, gaps=True),
  ]
  for column in found:
    kept = json.loads(json.dumps(column.to_json()))
    assert Column.from_json(kept) == column
  assert found[0].unlike("rmsprop", Layout().spelling) is None
  assert found[1].unlike("off", Layout().spelling) == seen.NEW_WORD
  texts = tables.read_csv(tmp_path / "runs.csv", ["acc"], Layout(text="run"))
  assert seen.columns(texts, np.array([0])) is None


@pytest.mark.parametrize(
  "value", [None, [], {}, {"name": 1}, {"name": "a", "low": 2, "high": 1},
            {"name": "a", "low": "x", "high": 1}, {"name": "a", "more": 1}]
)  # fmt: skip
def test_damaged_columns_are_told(value):
  with pytest.raises(InputError, match="does not describe its columns"):
    Column.from_json(value)
