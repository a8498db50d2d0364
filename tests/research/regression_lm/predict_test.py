import csv
import json

import numpy as np
import pytest

from models.errors import InputError
from models.numbers import Ieee
from research.predictors.data_options import DataOptions
from research.predictors.tables import Layout
from research.regression_lm import (
  RegressionLM,
  predict,
  rows_to_predict,
  sources,
  written_rows,
)

RUNS = "lr,depth,acc,ms\n" + "".join(
  f"0.{i % 9 + 1},{i % 5 + 2},{i / 20},{i + 1}\n" for i in range(20)
)
NEW = "note,depth,lr,acc\nfirst,3,0.1,\nsecond,4,0.2,0.5\nthird,5,0.3,\n"
SAMPLES = 8
OPTIONS = DataOptions(kind="csv", targets=("acc", "ms"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  home = tmp_path_factory.mktemp("predict")
  (home / "runs.csv").write_text(RUNS)
  (home / "new.csv").write_text(NEW)
  return home


@pytest.fixture(scope="module")
def lm(home):
  """A model that knows of its data what a training run writes down."""
  lm = RegressionLM.from_scratch(
    size="tiny",
    numbers=Ieee(mantissa_digits=1),
    num_objectives=2,
    max_length=32,
  )
  source = sources.open_source(OPTIONS, str(home / "runs.csv"))
  lm.info |= {"data": source.describe(), "columns": source.columns()}
  lm.learn_range(source.table.values[source.parts.train])
  lm.save(home / "model")
  return RegressionLM.from_pretrained(home / "model")


def written(home, lm, name, *, draws=False, batch=2, **changes):
  rows = rows_to_predict.read(lm, home / "new.csv", Layout())
  found = predict.batches(lm, rows, samples=SAMPLES, batch=batch, draws=draws)
  names = predict.predicted_names(lm, draws)
  written_rows.write(home / name, rows, found, names, **changes)
  return (home / name).read_text()


def expected(lm, level=0.9):
  texts = ["lr: 0.1, depth: 3", "lr: 0.2, depth: 4", "lr: 0.3, depth: 5"]
  return lm.predict(texts, SAMPLES, level=level)


def test_rows_come_out_with_median_and_interval(home, lm):
  rows = list(csv.DictReader(written(home, lm, "a.csv").splitlines()))
  assert list(rows[0]) == [
    *("note", "depth", "lr", "acc"),
    *("acc_median", "acc_low", "acc_high", "ms_median", "ms_low", "ms_high"),
  ]
  assert [row["note"] for row in rows] == ["first", "second", "third"]
  assert [row["acc"] for row in rows] == ["", "0.5", ""]
  told = expected(lm)
  for place, target in enumerate(("acc", "ms")):
    for what in ("median", "low", "high"):
      column = [float(row[f"{target}_{what}"]) for row in rows]
      np.testing.assert_array_equal(column, getattr(told, what)[:, place])


def test_json_lines_have_draws_and_numbers(home, lm):
  lines = written(home, lm, "a.jsonl", draws=True, keep=["note"]).splitlines()
  rows = [json.loads(line) for line in lines]
  assert list(rows[0])[:2] == ["note", "acc_median"] and len(rows[0]) == 9
  draws = [[row["acc_draws"], row["ms_draws"]] for row in rows]
  np.testing.assert_array_equal(
    np.moveaxis(np.array(draws), 1, 2), expected(lm).samples
  )
  text = written(home, lm, "draws.tsv", draws=True, keep=[])
  row = next(csv.DictReader(text.splitlines(), delimiter="\t"))
  assert [float(v) for v in row["acc_draws"].split()] == draws[0][0]


@pytest.mark.parametrize("batch", [1, 3, 99])
def test_the_batch_changes_nothing(home, lm, batch):
  told = written(home, lm, f"{batch}.csv", batch=batch, draws=True)
  assert told == written(home, lm, "two.csv", batch=2, draws=True)


def test_numbers_of_json_stay_numbers(home, lm):
  (home / "rows.jsonl").write_text(
    '{"id": 7, "lr": 0.10, "depth": 3, "tags": ["a"], "note": "\\ud800"}\n'
    '{"id": 123456789012345678901, "lr": 0.2, "depth": 4, "bad": NaN}\n'
  )
  rows = rows_to_predict.read(lm, home / "rows.jsonl", Layout())
  assert rows.texts[0] == "lr: 0.10, depth: 3"
  fake = lambda: iter([[{"y_median": None}, {"y_median": np.inf.real}]])
  written_rows.write(home / "b.jsonl", rows, fake(), ["y_median"])
  first, second = map(json.loads, (home / "b.jsonl").read_text().splitlines())
  assert first["id"] == 7 and first["tags"] == ["a"]
  assert first["y_median"] is None and second["y_median"] == "inf"
  assert second["id"] == 123456789012345678901 and second["bad"] is None
  keep = ["id", "tags", "bad", "note"]
  written_rows.write(home / "b.csv", rows, fake(), ["y_median"], keep=keep)
  lines = (home / "b.csv").read_text().splitlines()
  assert lines[1] == '7,"[""a""]",,\\ud800,'
  assert lines[2] == "123456789012345678901,,NaN,,inf"


def test_the_marks_of_the_file_are_those_of_the_answer(home, lm):
  text = written(home, lm, "marks.csv", delimiter=";", decimal=",", keep=[])
  cells = text.splitlines()[1].split(";")
  assert len(cells) == 6 and all("," in cell for cell in cells)
  assert float(cells[0].replace(",", ".")) == expected(lm).median[0, 0]


def test_a_file_appears_whole_or_not_at_all(home, lm):
  rows = rows_to_predict.read(lm, home / "new.csv", Layout())

  def broken():
    yield [{"y": 1.0}]
    raise KeyboardInterrupt

  (home / "kept.csv").write_text("before")
  for name in ("none.csv", "kept.csv"):
    with pytest.raises(KeyboardInterrupt):
      written_rows.write(home / name, rows, broken(), ["y"])
  assert (home / "kept.csv").read_text() == "before"
  assert not (home / "none.csv").exists() and not list(home.glob(".*draft"))
  for keep, names, words in [
    (["none"], ["y"], "--keep: there is no column 'none', but note, depth"),
    (None, ["lr"], "have a column 'lr' already"),
  ]:
    with pytest.raises(InputError, match=words):
      written_rows.write(home / "none.csv", rows, broken(), names, keep=keep)
  assert not (home / "none.csv").exists()


def test_the_validation_rows_widen_intervals(home, lm):
  lm = RegressionLM.from_pretrained(home / "model")
  bare = expected(lm, level=0.8)
  predict.calibrate(lm, home / "runs.csv", SAMPLES, level=0.8)
  wider = expected(lm, level=0.8)
  np.testing.assert_array_equal(wider.samples, bare.samples)
  assert (wider.low <= bare.low).all() and (wider.high >= bare.high).all()
  assert (wider.high - wider.low > bare.high - bare.low).any()
  (home / "other.csv").write_text(RUNS.replace("0.3,", "0.33,"))
  with pytest.raises(InputError, match="are not those of the model"):
    predict.calibrate(lm, home / "other.csv", SAMPLES)
  with pytest.raises(InputError, match="trained on no table"):
    lm.info["data"] = {"kind": "density"}
    predict.calibrate(lm, home / "runs.csv", SAMPLES)


@pytest.mark.parametrize("kept", [3, "lr", ["lr"], [{"name": "lr", "low": 1}]])
def test_a_damaged_model_is_told(home, kept):
  lm = RegressionLM.from_pretrained(home / "model")
  lm.info["columns"] = kept
  with pytest.raises(InputError, match="does not describe its columns"):
    rows_to_predict.read(lm, home / "new.csv", Layout())


def test_texts_of_a_model_that_no_table_trained(home, lm):
  made = RegressionLM.from_scratch(size="tiny", num_objectives=2)
  (home / "texts.jsonl").write_text('{"code": "a"}\n')
  with pytest.raises(InputError, match="texts of no file: write such texts"):
    rows_to_predict.read(made, home / "texts.jsonl", Layout())
  rows = rows_to_predict.read(made, home / "texts.jsonl", Layout(text="code"))
  assert rows.texts == ["a"]
  assert predict.predicted_names(made, False)[::3] == ["y1_median", "y2_median"]


@pytest.mark.parametrize(
  "path, words",
  [
    (None, "--out: name the file"),
    ("a.parquet", "ends in .csv, .tsv, .jsonl"),
    ("new.csv", "exists and is not overwritten: give another name, or --over"),
  ],
)
def test_the_name_of_the_answer(home, path, words):
  path = path and str(home / path)
  with pytest.raises(InputError, match=words):
    written_rows.check_out(path, overwrite=False)
  assert written_rows.check_out(str(home / "new.csv"), True) == home / "new.csv"
