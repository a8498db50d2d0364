import json

import numpy as np
import pytest

from models.errors import InputError
from research.predictors import peers, splits, tables
from research.predictors.calibration import Prediction
from research.predictors.number_scale import NumberScale
from research.regression_lm import evaluate

ROWS = 120


@pytest.fixture(scope="module")
def table():
  """Numbers that follow from two features, both in the text."""
  generator = np.random.default_rng(0)
  features = generator.integers(1, 9, (ROWS, 2)).astype(float)
  values = np.stack([features @ [1.0, 2.0], 10.0 ** features[:, 0]], 1)
  values[5, 0] = np.nan
  return tables.Table(
    texts=[f"a {int(a)} b {int(b)}" for a, b in features],
    values=values,
    targets=["sum", "power"],
    groups=[str(i) for i in range(ROWS)],
    features=features,
  )


@pytest.fixture(scope="module")
def found(table):
  parts = splits.split(table, train=0.6, valid=0.1, seed=0)
  generator = np.random.default_rng(1)
  truth = table.values[parts.test]
  draws = truth[:, None] + generator.normal(size=(len(truth), 40, 2))
  draws[0, :, 1] = np.nan
  answers = evaluate.answers_of_peers(table, parts, peers.NAMES)
  return evaluate.predictions(table, parts, Prediction(draws), answers), parts


def test_peers_learn_what_their_features_say(found):
  (first, second), _ = found
  for name in ("XGBoost", "MLP"):
    row = peers_score(first, name)
    assert row > 0.9, name
  assert peers_score(second, "XGBoost") > 0.95
  # Digits say the size only one by one: a ridge has them as words.
  assert peers_score(second, "ridge on TF-IDF") > 0.5


def peers_score(found, name):
  measure = evaluate.measures.spearman
  return measure(found.by_method[name], found.truth)


def test_missing_truth_is_left_out_and_a_missing_prediction_is_not(found):
  (first, second), parts = found
  assert len(first.truth) == len(parts.test) - (5 in parts.test)
  assert len(second.truth) == len(parts.test)
  assert np.isfinite(second.by_method[evaluate.OURS]).all()


def test_a_calibrated_interval_is_judged_by_what_it_holds():
  truth = np.arange(8.0)
  ends = np.stack([truth - 1, truth + 1], axis=1)
  ends[:2] += 5
  made = evaluate.Predictions(
    target="sum",
    truth=truth,
    by_method={evaluate.OURS: truth + 0.5},
    draws=truth[:, None] + np.zeros((8, 4)),
    interval=ends,
  )
  rows = evaluate.rows(made, num_samples=20)
  by = {row["metric"]: row["value"] for row in rows}
  assert by["coverage of 0.9, calibrated"] == 0.75


def test_rows_tell_all_methods_with_intervals(found):
  (first, _), _ = found
  rows = evaluate.rows(first, num_samples=50, system="regression_lm")
  metrics = {(row["method"], row["metric"]) for row in rows}
  for method in (evaluate.OURS, *peers.NAMES):
    for metric in ("spearman", "kendall", "mse", "mae", "crps"):
      assert (method, metric) in metrics
  assert (evaluate.OURS, "coverage of 0.9") in metrics
  for row in rows:
    assert row["low"] <= row["value"] <= row["high"] or "minus" in row["metric"]
    assert row["target"] == "sum" and row["system"] == "regression_lm"
  by = {(r["method"], r["metric"]): r["value"] for r in rows}
  best = first.best_peer("kendall")
  assert by[evaluate.OURS, f"kendall, minus {best}"] == pytest.approx(
    by[evaluate.OURS, "kendall"] - by[best, "kendall"]
  )
  assert by["MLP", "crps"] == pytest.approx(by["MLP", "mae"])
  lines = evaluate.table_lines(rows)
  assert [line["method"] for line in lines] == [evaluate.OURS, *peers.NAMES]
  assert first.best_peer("mse") in peers.NAMES


def test_answers_of_peers_are_kept(table, tmp_path, monkeypatch):
  parts = splits.split(table, train=0.6, valid=0.1, seed=0)
  ask = lambda seed: evaluate.answers_of_peers(
    table, parts, ["ridge on TF-IDF"], seed=seed, kept=tmp_path
  )
  first = ask(0)
  assert {*first} == {(t, "ridge on TF-IDF") for t in table.targets}
  with monkeypatch.context() as patch:
    patch.setattr(evaluate.peers, "predict", None)  # nothing is trained
    for key, answers in ask(0).items():
      np.testing.assert_array_equal(answers, first[key])
    with pytest.raises(TypeError):
      ask(1)  # another problem
  for path in tmp_path.iterdir():
    path.write_bytes(b"no array")
  with pytest.raises(InputError, match="is damaged: remove it"):
    ask(0)


def test_our_answers_are_written_row_by_row(table, tmp_path):
  parts = splits.split(table, train=0.6, valid=0.1, seed=0)
  draws = np.repeat(table.values[parts.test][:, None], 4, axis=1)
  draws[0, :, 0] = np.nan
  path = tmp_path / "answers.jsonl"
  evaluate.write_answers(path, table, parts, Prediction(draws))
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["row"] for line in lines] == parts.test.tolist()
  assert lines[0]["sum"]["median"] is None
  assert lines[1]["power"]["median"] == lines[1]["power"]["truth"]


def test_texts_alone_are_enough_for_every_peer(table):
  problem = peers.Problem(
    train_texts=table.texts[:80],
    train_features=table.features[:80, :0],
    train_values=table.values[:80, 1],
    test_texts=table.texts[80:],
    test_features=table.features[80:, :0],
  )
  assert NumberScale.of(problem.train_values).is_log
  for name in ("ridge on TF-IDF", "XGBoost"):
    predicted = peers.predict(name, problem)
    assert predicted.shape == (40,) and (predicted > 0).all()
  with pytest.raises(InputError, match="peer 'oracle' is unknown"):
    peers.predict("oracle", problem)


def test_a_gaussian_process_reads_counts():
  rng = np.random.default_rng(0)
  counts = rng.integers(0, 4, size=(120, 3)).astype(float)
  values = 90 - 10 * np.exp(-np.sqrt(counts).sum(axis=1))
  problem = lambda counts: peers.Problem(
    train_texts=[""] * 80,
    train_features=counts[:80],
    train_values=values[:80],
    test_texts=[""] * 40,
    test_features=counts[80:],
  )
  found = peers.predict("Gaussian process", problem(counts))
  assert np.corrcoef(found, values[80:])[0, 1] > 0.95
  assert values[:80].min() <= found.min() <= found.max() <= values[:80].max()
  with pytest.raises(InputError, match="needs features that are counts"):
    peers.predict("Gaussian process", problem(-counts))
