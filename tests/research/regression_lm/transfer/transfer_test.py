"""Transfer between tasks, its peers and its parts."""

import dataclasses

import numpy as np
import pytest

from models.errors import InputError
from research.predictors import peers as peers_lib
from research.predictors.text_forms import Facts
from research.regression_lm.transfer import adaptation, names
from research.regression_lm.transfer import parts as transfer_parts
from research.regression_lm.transfer import peers as transfer_peers
from research.regression_lm.transfer import run as transfer_run
from research.regression_lm.transfer import setup as transfer_setup
from research.regression_lm.transfer.options import Settings
from research.regression_lm.transfer.setup import Found, source_rows, splits

SMALL = Settings(
  encoder_layers=1,
  d_model=16,
  ensemble=2,
  views=2,
  test_views=2,
  steps_root=1.0,
  batch=4,
  grid=9,
  pretrain_steps=2,
  pretrain_batch=4,
  folds=0,
  # Dropout's draws are a seventh of what is compiled: batched_training_test
  # has them.
  dropout=0.0,
)


@pytest.fixture(scope="module")
def facts():
  generator = np.random.default_rng(0)
  x = generator.integers(0, 9, (40, 2)).astype(float)
  columns = {"near": x[:, 0] + 2, "far": x[:, 1], "aim": 3 * x[:, 0] + 5}
  columns["near"] = np.where(np.arange(40) == 7, np.nan, columns["near"])
  fields = [[f"a {a:g}", f"b {b:g}"] for a, b in x]
  return Facts({"only": fields}, {"only": x}, columns)


def setup(facts, **changes):
  options = {
    "targets": transfer_setup.tasks(facts, ["aim"]),
    "sources": transfer_setup.tasks(facts, ["near", "far:only"]),
    "sizes": [6],
    "seeds": 2,
    "tests": 10,
  }
  return transfer_setup.make(SMALL, **(options | changes))


@pytest.mark.parametrize("source_rows", [0, 20])
def test_models_and_peers_stand_in_the_same_rows(facts, tmp_path, source_rows):
  made = setup(facts, source_rows=source_rows)
  peers = ["XGBoost", *names.PER_SOURCE]
  if not source_rows:
    peers.append(names.WITH_SOURCES)
  said = []
  models = ["scratch", "pretrained"]
  assert transfer_run.untrained(made, tmp_path, models) == models
  rows = transfer_run.run(made, facts, tmp_path, models, peers, said.append)
  methods = {row["method"] for row in rows}
  ours = {"regression LM, scratch", "regression LM, pretrained"}
  if source_rows:
    ours.add("regression LM, ridge on its sources")
  assert methods == {*peers, *ours}
  assert all(row["tests"] == 10 and row["train"] == 6 for row in rows)
  assert all(np.isfinite(row["value"]) for row in rows)
  assert any(row["metric"].startswith("kendall, minus ") for row in rows)
  # Nothing is left to do, and the rows are the same.
  assert transfer_run.untrained(made, tmp_path, models) == []
  files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.npz")}
  again = transfer_run.run(made, facts, tmp_path, models, peers, said.append)
  assert again == rows
  assert files == {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.npz")}


def test_sources_of_other_rows_are_said_by_models(facts, tmp_path):
  # The first rows are of a new task, the others of two older ones.
  is_new = np.arange(40) < 24
  columns = {
    name: np.where(is_new == (name == "aim"), column, np.nan)
    for name, column in facts.columns.items()
  }
  columns["near"][24] = 1.0
  facts = dataclasses.replace(facts, columns=columns)
  made = setup(facts)
  peers = ["ridge per source + ridge"]
  rows = transfer_run.run(
    made, facts, tmp_path, ["pretrained"], peers, lambda line: None
  )
  assert {row["method"] for row in rows} == {
    *peers, "regression LM, pretrained", "regression LM, ridge on its sources"
  }  # fmt: skip
  assert all(np.isfinite(row["value"]) for row in rows)
  with pytest.raises(InputError, match="the sources are of other rows"):
    split = splits(made, facts)[0]
    transfer_peers.predict(
      names.WITH_SOURCES, made, facts, made.targets[0], split, 6, 0
    )


def test_gaps_in_features_are_means_for_ridge():
  x = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
  filled = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
  y = np.array([1.0, 3.0, 2.5])
  np.testing.assert_array_equal(
    transfer_peers.ridge(x, y, x), transfer_peers.ridge(filled, y, filled)
  )


def test_no_model_learns_the_fold_that_calibrates_it(
  facts, tmp_path, monkeypatch
):
  made = dataclasses.replace(setup(facts, seeds=1), folds=3)
  learned = []
  train = adaptation.batched_training.train

  def spied(model, params, pool, pairs, grids, members, *rest, **more):
    learned.extend(np.asarray(pairs.rows)[own] for own in members)
    return train(model, params, pool, pairs, grids, members, *rest, **more)

  monkeypatch.setattr(adaptation.batched_training, "train", spied)
  run = transfer_run.run
  run(made, facts, tmp_path, ["scratch"], ["XGBoost"], lambda line: None)
  (split,) = splits(made, facts)
  examples = split.known[:6]
  folds = transfer_setup.folds(made, 6, 0)
  assert len(folds) == 3 and set(np.concatenate(folds)) == set(range(6))
  sets = [set(examples), *(set(np.delete(examples, f)) for f in folds)]
  assert [set(rows) for rows in learned] == [s for s in sets for _ in range(2)]
  for method in ("regression LM, scratch", "XGBoost"):
    path = transfer_parts.path(tmp_path, method, "aim", 6, 0)
    held = transfer_parts.read(path)[1].held
    assert held.points.shape == (6,) and np.isfinite(held.points).all()


def test_examples_left_out_stand_in_their_order():
  folds = [np.array([1, 4]), np.array([0, 3]), np.array([2, 5])]
  said = transfer_peers.held_out(folds, lambda rest, fold: fold + 10.0)
  np.testing.assert_array_equal(said, np.arange(6) + 10.0)
  parts = [Found.of_points(fold + 10.0) for fold in folds]
  joined = Found.joined(parts, folds)
  np.testing.assert_array_equal(joined.points, said)
  np.testing.assert_array_equal(joined.atoms[:, 0], said)
  assert transfer_peers.held_out([], lambda rest, fold: fold) is None


def test_errors_on_folds_widen_intervals_to_what_they_say(tmp_path):
  # Distributions that are four times too narrow, of 60 examples and 2000 tests.
  generator = np.random.default_rng(2)
  truth = generator.normal(size=2060)
  levels = (np.arange(200) + 0.5) / 200
  atoms = np.quantile(generator.normal(size=100000), levels) / 4
  found = Found(
    np.zeros(2060),
    np.broadcast_to(atoms, (2060, 200)),
    np.full((2060, 200), 1 / 200),
  )
  column = truth + 0.0
  facts = Facts(
    {"only": [[f"a {i}"] for i in range(2060)]},
    {"only": np.zeros((2060, 1))},
    {"aim": column, "near": column, "far": column},
  )
  made = setup(facts, sources=(), sizes=[60], seeds=1, tests=2000)
  test = dataclasses.replace(
    found.take(slice(2000)), held=found.take(slice(60))
  )
  transfer_parts.write(tmp_path, "regression LM, a", test, "aim", 60, 0)
  rows = transfer_parts.rows(made, facts, splits(made, facts), tmp_path)
  by = {row["metric"]: row["value"] for row in rows}
  assert by["coverage of 0.9"] < 0.4
  # 60 truths: the standard deviation of the coverage is .04.
  assert 0.8 < by["coverage of 0.9, calibrated"] < 0.99
  score = "interval score of 0.9"
  # That of the right interval, 2 * 1.645 wide, is 4.13 (float64 integral).
  assert 4.0 < by[f"{score}, calibrated"] < 4.6 < by[score]


def test_a_ridge_below_zero_has_intervals_of_plain_distances(tmp_path):
  # Latencies over a factor of 1,000; a ridge is off by 5, also below zero.
  generator = np.random.default_rng(3)
  truth = np.exp(generator.uniform(np.log(0.1), np.log(100), 60))
  off = np.where(np.arange(60) % 2, 5.0, -5.0)
  facts = Facts(
    {"only": [[f"a {i}"] for i in range(60)]},
    {"only": np.zeros((60, 1))},
    {"aim": truth, "near": truth, "far": truth},
  )
  made = setup(facts, sources=(), sizes=[20], seeds=1, tests=40)
  (split,) = splits(made, facts)
  said = Found.of_points(
    (truth + off)[split.test], held=(truth + off)[split.known]
  )
  assert (said.held.points < 0).sum() >= 2
  for method in names.PER_SOURCE:
    transfer_parts.write(tmp_path, method, said, "aim", 20, 0)
  rows = transfer_parts.rows(made, facts, [split], tmp_path)
  wide = "interval score of 0.9, calibrated"
  scores = [row["value"] for row in rows if row["metric"] == wide]
  # Ends are 5 on either side of the point, and the truth is one of them, but
  # for float32.
  np.testing.assert_allclose(scores, [10, 10], rtol=1e-4)


def test_repeated_settings_are_told(tmp_path):
  fields = [[f"a {i // 2}"] for i in range(40)]
  x = np.arange(40.0)
  columns = {"aim": x, "near": x, "far": x}
  facts = Facts({"only": fields}, {"only": x[:, None] // 2}, columns)
  made = setup(facts, sources=(), sizes=[20])
  said = []
  rows = transfer_run.run(made, facts, tmp_path, [], ["XGBoost"], said.append)
  split = splits(made, facts)[0]
  known = set(split.known[:20] // 2)
  twin = np.array([row // 2 in known for row in split.test])
  count = twin.sum()
  assert 0 < count < 9 and f"{count} of 10 test rows" in said[0]
  # The measures once more, without them.
  (row,) = (
    row
    for row in rows
    if row["metric"] == "mae, without twins" and row["seed"] == 0
  )
  assert row["twins"] == count
  path = transfer_parts.path(tmp_path, "XGBoost", "aim", 20, 0)
  points = transfer_parts.read(path)[1].points
  errors = np.abs(points - x[split.test])
  assert row["value"] == pytest.approx(errors[~twin].mean())


def test_test_rows_are_neither_examples_nor_sources(facts):
  made = setup(facts, source_rows=20)
  for split in splits(made, facts):
    rows = source_rows(made, facts, split)
    assert len(rows) == 20 and not set(rows) & set(split.test)
    assert set(split.known[:6]) <= set(rows)
  with pytest.raises(InputError, match="smaller --sizes"):
    splits(setup(facts, sizes=[39]), facts)


def test_the_target_is_read_under_the_name_of_the_nearest_source(facts):
  made = setup(facts)
  rows = np.array([1, 2, 3, 4, 7, 8])
  aim = facts.column("aim")[rows]
  known = adaptation._of_sources(made, facts, None, None, 0, rows)
  assert np.isnan(known[4, 0]) and np.isfinite(known[:, 1]).all()
  assert adaptation._nearest(known, aim) == 0
  noise = np.array([1.0, 5.0, 2.0, 4.0, 3.0, 0.0])
  assert adaptation._nearest(known, noise) is None


def test_ridge_takes_the_strength_with_the_least_left_out_error():
  generator = np.random.default_rng(1)
  x = generator.normal(size=(12, 4))
  y = x @ [1.0, 0, 0, 2] + generator.normal(size=12)
  test = generator.normal(size=(3, 4))

  def fit(x, y, test, alpha, mean, spread):
    z = (x - mean) / spread
    inner = z - z.mean(0)
    w = np.linalg.solve(inner.T @ inner + alpha * np.eye(4), inner.T @ y)
    return ((test - mean) / spread - z.mean(0)) @ w + y.mean()

  mean, spread = x.mean(0), x.std(0)
  errors = {}
  for alpha in np.logspace(-3, 3, 13):
    kept = [np.arange(12) != i for i in range(12)]
    left = [
      y[i] - fit(x[k], y[k], x[i], alpha, mean, spread)
      for i, k in enumerate(kept)
    ]
    errors[alpha] = np.mean(np.square(left))
  best = min(errors, key=errors.get)
  expected = fit(x, y, test, best, mean, spread)
  np.testing.assert_allclose(
    transfer_peers.ridge(x, y, test), expected, rtol=1e-9
  )


def test_a_damaged_part_is_named(tmp_path):
  found = Found(np.arange(3.0), np.ones((3, 4)), np.full((3, 4), 0.25))
  transfer_parts.write(tmp_path, "a, b", found, "aim", 6, 0)
  path = transfer_parts.path(tmp_path, "a, b", "aim", 6, 0)
  method, read = transfer_parts.read(path)
  assert method == "a, b" and read.held is None
  np.testing.assert_array_equal(read.points, found.points)
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(InputError, match="is damaged"):
    transfer_parts.read(path)


def test_a_star_stands_for_columns(facts):
  named = lambda *names: {t.column for t in transfer_setup.tasks(facts, names)}
  assert named("*") == set(facts.columns)
  assert named("n*r", "f*") == {"near", "far"}
  with pytest.raises(InputError, match=r"no column 'z\*'"):
    named("z*")


def test_mistakes_are_told(facts):
  with pytest.raises(InputError, match="no column 'none'"):
    transfer_setup.tasks(facts, ["none"])
  with pytest.raises(InputError, match="no form 'live'"):
    transfer_setup.tasks(facts, ["aim:live"])
  with pytest.raises(InputError, match="no multiple of 16"):
    dataclasses.replace(SMALL, d_model=20)
  with pytest.raises(InputError, match="more than views"):
    dataclasses.replace(SMALL, test_views=3)
  with pytest.raises(InputError, match="folds=1"):
    dataclasses.replace(SMALL, folds=1)
  with pytest.raises(InputError, match="'best' is unknown"):
    peers_lib.asked(["best"], names.MODELS, "model")
  with pytest.raises(InputError, match="'LightGBM' is unknown"):
    peers_lib.asked(["LightGBM"], names.PEERS)
