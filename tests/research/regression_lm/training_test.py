import dataclasses
import functools

import jax
import numpy as np
import pytest

from models.errors import InputError
from research.core import loop, metrics
from research.core import mesh as mesh_lib
from research.predictors.data_options import DataOptions
from research.regression_lm import RegressionLM, sources, training
from research.regression_lm.density.source import DensitySource
from research.regression_lm.expected import Scale
from research.regression_lm.options import Options

OPTIONS = Options(
  size="tiny",
  mantissa_digits=2,
  steps=9,
  batch=8,
  learning_rate=0.02,
  warmup=2,
  eval_every=3,
  dropout=0.1,
)
DATA = DataOptions(kind="csv", targets=("y",))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  home = tmp_path_factory.mktemp("rlm")
  lines = [f"{a},{b},{a + 2 * b}" for a in range(6) for b in range(5)]
  (home / "data.csv").write_text("\n".join(["a,b,y", *lines]) + "\n")
  return home


def run_of(home, name, options=OPTIONS, **changes):
  source = sources.open_source(DATA, home / "data.csv")
  return training.Run(
    options=options,
    source=source,
    workdir=home / name,
    mesh=mesh_lib.data_mesh(1),
    checkpoint_every=4,
    log_every=1,
    progress=False,
    **changes,
  )


@pytest.fixture(scope="module")
def whole(home):
  said = []
  lm = training.train(run_of(home, "whole"), said.append)
  return lm, said


def rows_of(home, name):
  rows = metrics.read_jsonl(home / name / "metrics.jsonl")
  return [metrics.without_timing(row) for row in rows]


def test_a_run_learns_and_leaves_its_files(home, whole):
  lm, said = whole
  rows = rows_of(home, "whole")
  assert [row["step"] for row in rows] == list(range(9))
  assert rows[-1]["valid_loss"] < rows[2]["valid_loss"]
  assert "parameters" in said[0]
  assert "validation loss" in (home / "whole/report.md").read_text()
  found = RegressionLM.from_pretrained(home / "whole/model")
  texts = ["a: 1, b: 2"]
  np.testing.assert_array_equal(found.sample(texts, 5), lm.sample(texts, 5))
  assert found.info["data"]["targets"] == ["y"]
  # The model is that of the best evaluation, after 3, 6 or 9 updates.
  losses = {r["step"] + 1: r["valid_loss"] for r in rows if "valid_loss" in r}
  assert found.info["step"] == min(losses, key=losses.get)


def test_a_killed_run_ends_with_the_same_numbers(home, whole, monkeypatch):
  class Killed(Exception):
    pass

  save, calls = loop.Checkpointer.save, []

  def dies(self, step, state):
    save(self, step, state)
    calls.append(step)
    if step == 4:
      raise Killed

  monkeypatch.setattr(loop.Checkpointer, "save", dies)
  with pytest.raises(Killed):
    training.train(run_of(home, "killed"), lambda line: None)
  assert not (home / "killed/model").exists()
  lm = training.train(run_of(home, "killed"), lambda line: None)
  assert calls == [4, 8, 9]
  assert rows_of(home, "killed") == rows_of(home, "whole")
  jax.tree.map(np.testing.assert_array_equal, lm.params, whole[0].params)


def test_training_goes_on_from_a_model(home, whole):
  start = str(home / "whole/model")
  other = dataclasses.replace(OPTIONS, size="mini", dtype="bfloat16")
  lm = training._model(run_of(home, "second", other, start=start))
  jax.tree.map(np.testing.assert_array_equal, lm.params, whole[0].params)
  assert lm.model.compute.dtype == "bfloat16"
  two = dataclasses.replace(DATA, targets=("y", "a"))
  run = dataclasses.replace(
    run_of(home, "third", start=start),
    source=sources.open_source(two, home / "data.csv"),
  )
  with pytest.raises(InputError, match="predicts 1 numbers, the data has 2"):
    training.train(run, lambda line: None)


def test_a_workdir_keeps_to_its_data(home, whole):
  other = dataclasses.replace(DATA, split_seed=1)
  run = dataclasses.replace(
    run_of(home, "whole"),
    source=sources.open_source(other, home / "data.csv"),
  )
  with pytest.raises(InputError, match="source"):
    training.train(run, lambda line: None)
  source = sources.open_source(DATA, home / "data.csv")
  described = whole[0].info["data"]
  sources.check_same(source, described)
  with pytest.raises(InputError, match="are not those of the model"):
    sources.check_same(run.source, described)


def test_batches_of_a_grid_have_scores(home, whole):
  source = sources.open_source(DATA, home / "data.csv")
  prepared = source.prepare(whole[0], 8, 0)
  scale = Scale.fit("rank", prepared.values)
  batch = prepared.scored(scale)(3)
  plain = prepared.batch_at(3)
  np.testing.assert_array_equal(batch["tokens"], plain["tokens"])
  values = whole[0].model.codec.values(batch["targets"])
  np.testing.assert_array_equal(batch["scores"], scale.scores(values))


def test_densities_share_texts(home):
  options = dataclasses.replace(
    OPTIONS,
    batch=32,
    steps=2,
    expected_value=0.0,
    ranking=0.0,
    optimizer="muon",
  )
  run = dataclasses.replace(
    run_of(home, "density", options), source=DensitySource()
  )
  lm = training.train(run, lambda line: None)
  assert lm.num_objectives == 2
  rows = rows_of(home, "density")
  assert rows[0]["loss"] > 0 and np.isfinite(rows[-1]["valid_loss"])
  batch = run.source.prepare(lm, 32, 0).batch_at(0)
  assert batch["tokens"].shape[0] == 2
  assert batch["targets"].shape == (2, 16, lm.model.codec.length)
  for change, words in [
    ({"batch": 8}, "no multiple of 16"),
    ({"ranking": 1.0}, "leave --expected_value"),
  ]:
    bad = dataclasses.replace(options, **change)
    bad_run = dataclasses.replace(run, options=bad, workdir=home / words[:4])
    with pytest.raises(InputError, match=words):
      training.train(bad_run, lambda line: None)


def test_muon_orthogonalises_the_layers_matrices_alone():
  schedule, tx = training.make_optimizer(
    Options(optimizer="muon", warmup=0, weight_decay=0.0, clip_norm=0.0)
  )
  lm = RegressionLM.from_scratch(size="tiny", encoder_layers=2)
  noise = functools.partial(jax.random.normal, jax.random.key(0))
  params = {
    "slots": lm.params["slots"],
    "q_proj": lm.params["encoder"]["attn"]["q_proj"],
  }
  grads = jax.tree.map(lambda x: noise(x.shape), params)
  update, _ = tx.update(grads, tx.init(params), params)
  for layer in update["q_proj"]["kernel"]:
    sizes = np.linalg.svd(layer, compute_uv=False)
    assert sizes.max() / sizes.min() < 2.5
  table = np.linalg.svd(update["slots"]["table"], compute_uv=False)
  assert table.max() / table.min() > 2.5


def test_a_run_ends_when_validation_is_not_better_any_more(home):
  options = dataclasses.replace(
    OPTIONS, steps=60, eval_every=2, early_stopping=2, learning_rate=0.3
  )
  said = []
  run = run_of(home, "early", options)
  lm = training.train(run, said.append)
  stopped = [line for line in said if line.startswith("stopped after update")]
  last = int(stopped[0].split()[3].rstrip(":"))
  assert last < 60 and last - lm.info["step"] == 4
  before = jax.tree.map(np.asarray, lm.params)
  # The same command finds the same end.
  lm = training.train(run, said.append)
  assert said[-1] == stopped[0]
  jax.tree.map(np.testing.assert_array_equal, lm.params, before)
  wrong = dataclasses.replace(options, export="last")
  with pytest.raises(
    InputError, match="--early_stopping=2: needs --export=best"
  ):
    training.train(run_of(home, "early_last", wrong), said.append)


@pytest.mark.parametrize(
  "target, words",
  [
    (
      "7e12",
      "1 of 27 targets 'y' are too large .*7e.12 .*exponent_digits=2",
    ),
    ("1e-11", "1 of 27 targets 'y' are 0 in .* line .*exponent_digits=2"),
    ("inf", "line 8: y is inf: .* --missing .* --special"),
  ],
)
def test_targets_that_cannot_be_written_stop_a_run(home, target, words):
  lines = (home / "data.csv").read_text().splitlines()
  for row in range(7, len(lines)):  # One of these is for training.
    changed = [*lines]
    changed[row] = ",".join([*changed[row].split(",")[:2], target])
    path = home / "beyond.csv"
    path.write_text("\n".join(changed) + "\n")
    source = sources.open_source(DATA, path)
    if row - 1 in source.parts.train:
      break
  words = words.replace("line 8", f"line {row + 1}")
  run = dataclasses.replace(run_of(home, "beyond"), source=source)
  with pytest.raises(InputError, match=words):
    training.train(run, lambda line: None)


def test_texts_that_a_mesh_cannot_cut_are_told(home):
  run = run_of(home, "cut")
  run = dataclasses.replace(run, mesh=mesh_lib.make({"sequence": 3}))
  with pytest.raises(InputError, match="and 8 is no multiple of sequence:3"):
    training.train(run, print)
  assert not (home / "cut").exists()
