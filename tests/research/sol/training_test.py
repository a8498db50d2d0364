"""Whole runs in one process; killed ones are in `sol_scripts_test.py`."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from models.convert import Checkpoint
from models.errors import InputError
from research.core import mesh as mesh_lib
from research.core import metrics
from research.sol import artefact, training
from research.sol.options import Options
from tests.research.sol import toy


def run_of(workdir, mode, **changes):
  given = {
    "preset": "J-2L",
    "page_size": toy.PAGE,
    "context": toy.CONTEXT,
    "horizon": toy.HORIZON,
    "windows": 2,
    "episodes": 1,
    "group_size": 4,
    "width": 16,
    "updates": 2,
  }
  options = Options(**(given | changes)).filled(mode)
  return training.Run(
    options=options,
    mode=mode,
    checkpoint=Checkpoint(
      config=toy.CONFIG, params=toy.lm(), name="toy", path=workdir
    ),
    workdir=workdir,
    flags=vars(options),
    mesh=mesh_lib.data_mesh(1),
    calibration_windows=2,
    ridge_windows=1,
    checkpoint_every=1,
    progress=False,
  )


def batches_of(run):
  text = toy.text(800)
  return training.batches(run, text, training._pool(run, text))


def test_windows_that_a_mesh_cannot_cut_are_told(tmp_path):
  run = run_of(tmp_path / "run", "published")
  for shape, words in (
    ({"sequence": 7}, "--context=.* is no multiple of sequence:7"),
    ({"data": 2, "fsdp": 2}, "--windows=2 is no multiple of 4 parts of rows"),
  ):
    cut = dataclasses.replace(run, mesh=mesh_lib.make(shape))
    with pytest.raises(InputError, match=words):
      training.train(cut, toy.text(800), print)
  assert not (tmp_path / "run").exists()


def test_the_published_mode_from_end_to_end(tmp_path):
  """With prefixes that are computed once."""
  run = run_of(tmp_path, "published", cached_windows=3)
  said = []
  training.train(run, toy.text(800), said.append)
  assert any("reading 3 windows once" in line for line in said)
  assert any("the clip stopped the gradient of" in line for line in said)
  assert not (tmp_path / "warm_start").exists()
  found = artefact.load(tmp_path / "policy")
  assert found.mode == "published" and found.options == run.options
  assert found.prices.shape == found.spent.shape == (0,)
  assert found.coefficients.shape == (10, 3)
  rows = metrics.read_jsonl(tmp_path / "grpo" / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 1]
  assert all(np.isfinite(row["penalty"]) for row in rows)
  with pytest.raises(InputError, match="--gamma"):
    training.train(
      run_of(tmp_path, "published", cached_windows=3, gamma=0.1),
      toy.text(800),
      said.append,
    )
  flags = json.loads((tmp_path / "flags.json").read_text())
  assert flags["gamma"] == 0.85


@pytest.mark.parametrize("mode, length", [("published", 27), ("frugal", 240)])
def test_short_text_is_told_before_anything_is_trained(tmp_path, mode, length):
  """The last tenth is for calibration, which a price needs."""
  said = []
  with pytest.raises(InputError, match="24 tokens, a window needs 25"):
    training.train(run_of(tmp_path, mode), toy.text(length), said.append)
  assert not said or mode == "published"


@pytest.mark.parametrize("cached, windows", [(6, 2), (5, 2), (3, 4)])
def test_cached_windows_come_once_an_epoch(tmp_path, cached, windows):
  run = run_of(tmp_path, "published", cached_windows=cached, windows=windows)
  batch_at = batches_of(run)
  per_epoch = max(cached // windows, 1)
  for epoch in range(3):
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    ids = np.concatenate([batch_at(step)["ids"] for step in steps])
    assert len(ids) == per_epoch * windows and set(ids) <= set(range(cached))
    assert len(set(ids)) == min(len(ids), cached)
  for step in range(4):
    chex.assert_trees_all_equal(batch_at(step), batch_at(step))
  assert any(
    np.any(batch_at(0)["ids"] != batch_at(k * per_epoch)["ids"])
    for k in range(1, 6)
  )


def test_other_seeds_have_folders_of_their_own(tmp_path):
  run = run_of(tmp_path, "frugal")
  other = run.of_seed(3)
  assert (run.seed, other.seed) == (0, 3)
  assert other.workdir == tmp_path / "seed3" and other.flags["seed"] == 3
  assert other.options == run.options and "seed" not in run.flags


def test_fresh_windows_are_new_at_every_step(tmp_path):
  run = run_of(tmp_path, "published")
  batch_at = batches_of(run)
  one, other = batch_at(0), batch_at(1)
  assert one["tokens"].shape == (2, run.method.layout.length)
  assert np.any(one["tokens"] != other["tokens"])
  np.testing.assert_array_equal(one["ids"], [0, 1])


def test_cached_prefixes_are_those_of_their_windows(tmp_path):
  """Windows are read by eights; ten of them leave a part."""
  run = run_of(tmp_path, "published", cached_windows=10)
  pool = training._pool(run, toy.text(800))
  cache = training._prefixes(run, toy.lm(), pool, lambda line: None)
  batch = training.batches(run, toy.text(800), pool)(3)
  method = run.method
  tokens = batch["tokens"][:, : method.layout.prefix + 1]
  fresh = jax.jit(
    lambda lm, tokens: method.setup.build_prefix(
      lm, tokens, method.layout.context
    )
  )(toy.lm(), tokens)
  for name, expected in vars(fresh).items():
    value = getattr(cache, name)
    by_layer = name in ("k", "v", "page_min", "page_max")
    value = value[:, batch["ids"]] if by_layer else value[batch["ids"]]
    np.testing.assert_allclose(
      value, expected, rtol=1e-4, atol=1e-5, err_msg=name
    )
