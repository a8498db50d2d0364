"""The shipped slice of measured programs, its loader, splits and peers."""

import json
import lzma
import pathlib

import numpy as np
import pytest

from models.errors import InputError
from models.numbers import Ieee
from research.predictors import measures, peers, program_table
from research.predictors.calibration import Prediction
from research.predictors.data_options import DataOptions
from research.program_metrics import dataset, grammar
from research.regression_lm import RegressionLM, data_sets, evaluate
from research.regression_lm.sources import TableSource, open_source

PATH = pathlib.Path("data/program_metrics/programs.jsonl.xz")
TARGETS = ("flops", "bytes_accessed", "peak_bytes", "latency_us")


def options(**more):
  return DataOptions(**{"kind": "programs", "targets": TARGETS} | more)


@pytest.fixture(scope="module")
def table():
  return data_sets.load(options(), PATH)


def test_the_shipped_programs_are_those_of_the_grammar(table):
  assert len(table) == 192 and PATH.stat().st_size < 300_000
  for i in (0, 17, 191):
    assert table.texts[i] == grammar.program(0, i).source


def test_rows_have_numbers_of_all_kinds(table):
  assert list(table.targets) == list(TARGETS)
  assert np.isfinite(table.values).all() and (table.values >= 0).all()
  np.testing.assert_array_equal(table.costs["flops"], table.values[:, 0])
  assert set(table.parts) == {*dataset.SPLITS} and len(table.costs) == 4
  # What two runs say of the same programs is nearly the same.
  again = table.again["latency_us"]
  assert measures.spearman(again, table.values[:, 3]) > 0.95
  # Of texts of one length the numbers differ by orders of magnitude.
  low, high = np.percentile(table.values[:, 0], [10, 90])
  assert high > 100 * max(low, 1)


def test_what_the_compiler_could_not_count_is_missing(tmp_path):
  with lzma.open(PATH, "rt") as file:
    rows = [json.loads(line) for line in file][:3]
  rows[1]["flops"] = -1.0
  path = tmp_path / "programs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  table = data_sets.load(options(), path)
  assert np.isnan(table.values).tolist() == [
    [False] * 4, [True, False, False, False], [False] * 4,
  ]  # fmt: skip
  assert table.costs["flops"][1] == 0 and table.costs["flops"][0] > 0


@pytest.mark.parametrize("view", program_table.VIEWS)
def test_a_view_is_the_text(view, table):
  found = data_sets.load(options(text=view), PATH)
  np.testing.assert_array_equal(found.values, table.values)
  word = {"jaxpr": "lambda", "stablehlo": "module @jit_f", "sized": "return "}
  assert all(word.get(view, "def f(") in text for text in found.texts)


@pytest.mark.parametrize("named", dataset.SPLITS)
def test_named_splits_are_those_of_the_data(table, named):
  parts = options(named=named).split(table)
  rows = np.concatenate([parts.train, parts.valid, parts.test])
  assert sorted(rows) == list(range(len(table)))
  words = np.array(table.parts[named])
  for part in dataset.PARTS:
    assert set(words[getattr(parts, part)]) == {part}
  if named == "operators":
    uses = [bool({*dataset.HELD_OUT} & {*g.split()}) for g in table.groups]
    assert set(np.flatnonzero(uses)) == set(parts.test)
  few = options(named=named, train=20, test=5).split(table)
  np.testing.assert_array_equal(few.train, parts.train[:20])
  np.testing.assert_array_equal(few.test, parts.test[:5])


@pytest.mark.parametrize("view", ["source", "typed", "sized"])
def test_only_rows_for_training_have_copies(view):
  chosen = options(text=view, named="random", text_copies=4)
  table = data_sets.load(chosen, PATH)
  source = TableSource(table, chosen.split(table), chosen)
  lm = RegressionLM.from_scratch(
    size="tiny", num_objectives=4, numbers=Ieee(), max_length=4096
  )
  prepared = source.prepare(lm, 8, 0)
  train, valid = source.parts.train, source.parts.valid
  assert len(prepared.values) == 4 * len(train)
  assert (prepared.values[::4] == prepared.values[3::4]).all()
  assert len(prepared.valid) == len(valid)
  assert source.texts() == [table.texts[i] for i in train]
  assert source.questions(lm) == [table.texts[i] for i in source.parts.test]
  np.testing.assert_array_equal(
    prepared.batch_at(3)["tokens"],
    source.prepare(lm, 8, 0).batch_at(3)["tokens"],
  )
  made = table.other_texts(int(train[0]), 3, 0)
  assert made == table.other_texts(int(train[0]), 3, 0)
  # The tokenizer of a model is of bytes, and the text its own first.
  lengths = prepared.valid.texts.lengths
  assert lengths.tolist() == [len(table.texts[i].encode()) for i in valid]


def test_other_texts_than_python_have_no_copies(tmp_path):
  (tmp_path / "a.csv").write_text("a,y\n1,2\n3,4\n")
  chosen = DataOptions(kind="csv", targets=("y",), text_copies=8)
  with pytest.raises(InputError, match="--text_copies=8: --data=csv knows one"):
    data_sets.load(chosen, tmp_path / "a.csv")
  with pytest.raises(InputError, match="--text_copies=8: --data=density"):
    open_source(DataOptions(kind="density", text_copies=8), None)


def test_a_text_that_is_no_program_has_no_sizes(tmp_path):
  with lzma.open(PATH, "rt") as file:
    rows = [json.loads(line) for line in file][:2]
  rows[1]["typed"] = "x = 3\n"
  path = tmp_path / "programs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert len(data_sets.load(options(text="typed"), path)) == 2
  with pytest.raises(InputError, match="line 2: a text is no program"):
    data_sets.load(options(text="sized"), path)


def test_a_split_is_part_of_what_a_model_was_trained_on(table):
  by_name = {
    named: TableSource(table, options(named=named).split(table),
                       options(named=named)).describe()
    for named in dataset.SPLITS
  }  # fmt: skip
  assert by_name["sizes"]["named"] == "sizes"
  assert len({found["digest"] for found in by_name.values()}) == 3


def test_costs_predict_latency_and_nothing_else(table):
  parts = options(named="random").split(table)
  truth = table.values[parts.test]
  names = ["XGBoost on token counts", *peers.COST_NAMES]
  found = evaluate.predictions(
    table,
    parts,
    Prediction(np.repeat(truth[:, None], 3, axis=1)),
    evaluate.answers_of_peers(table, parts, names),
  )
  counted = {evaluate.OURS, "XGBoost on token counts"}
  assert all({*each.by_method} == counted for each in found[:3])
  latency = found[3]
  assert {*latency.by_method} == (counted | {*peers.COST_NAMES, evaluate.AGAIN})
  score = lambda name: measures.spearman(latency.by_method[name], latency.truth)
  assert score("cost analysis") > 0.6
  assert score(evaluate.AGAIN) > 0.9
  assert latency.best_peer("spearman") != evaluate.AGAIN


@pytest.mark.parametrize(
  "more, words",
  [
    ({"text": "hlo"}, "--text_column=hlo: take one of source, typed, sized"),
    ({"targets": ("joules",)}, "line 1: has no 'joules'"),
    ({"named": "time"}, "--split=time: the data has random, operators, sizes"),
    (
      {"text": "jaxpr", "text_copies": 2},
      "--text_copies=2: --data=programs --text_column=jaxpr knows one text",
    ),
    ({"text_copies": 2, "prompt_shots": 1}, "--text_copies and --prompt_shots"),
  ],
)
def test_mistakes_are_one_line(more, words):
  chosen = options(**more)
  with pytest.raises(InputError, match=words):
    chosen.split(data_sets.load(chosen, PATH))


def test_a_table_without_named_splits_says_so(tmp_path):
  (tmp_path / "a.csv").write_text("a,y\n1,2\n")
  chosen = DataOptions(kind="csv", targets=("y",), named="random")
  with pytest.raises(InputError, match="--split=random: the data has none"):
    chosen.split(data_sets.load(chosen, tmp_path / "a.csv"))


def test_an_empty_file_is_one_line(tmp_path):
  (tmp_path / "a.jsonl").write_text("\n")
  with pytest.raises(InputError, match="has no row"):
    data_sets.load(options(), tmp_path / "a.jsonl")


def test_unknown_kinds_of_data_say_so(tmp_path):
  with pytest.raises(InputError, match="data 'xml' is unknown: take jsonl"):
    data_sets.load(DataOptions(kind="xml", targets=("y",)), tmp_path)
