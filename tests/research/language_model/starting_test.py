"""Runs that go on from others, and models that are fine-tuned."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from models import convert
from models import tokenizer as tokenizer_lib
from models.errors import InputError
from research.core import mesh as mesh_lib
from research.core import metrics, processes
from research.core.checkpoint import Checkpointer
from research.language_model import starting, training
from research.language_model.options import Options

OPTIONS = Options(
  arch="transformer",
  tokenizer="bpe",
  vocab_size=260,
  layers=1,
  d_model=16,
  d_ff=16,
  heads=2,
  kv_heads=1,
  length=16,
  batch=4,
  steps=4,
  schedule="constant",
  learning_rate=0.03,
  warmup=2,
  eval_every=4,
  eval_windows=4,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  home = tmp_path_factory.mktemp("starting")
  (home / "text.txt").write_text("abcdefgh\n" * 200)
  (home / "other.txt").write_text("hgfedcba\n" * 200)
  return home


def run_of(home, name, options=OPTIONS, text="text.txt", **rest):
  return training.Run(
    options=options,
    text=[str(home / text)],
    workdir=home / name,
    cache=home / "cache",
    mesh=mesh_lib.data_mesh(1),
    log_every=1,
    progress=False,
    **rest,
  )


def silent(line):
  del line


@pytest.fixture(scope="module")
def short(home):
  """Four updates."""
  run = run_of(home, "short")
  training.train(run, silent)
  return run.workdir


def rows_of(workdir):
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  return [metrics.without_timing(row) for row in rows]


def test_a_run_goes_on_longer_as_if_it_had_never_stopped(home, short):
  more = dataclasses.replace(OPTIONS, steps=8)
  whole, longer = run_of(home, "whole", more), run_of(
    home, "longer", more, start=str(short)
  )  # fmt: skip
  training.train(whole, silent)
  training.train(longer, silent)
  assert rows_of(longer.workdir) == rows_of(whole.workdir)[4:]
  weights = "model/model.safetensors"
  assert (longer.workdir / weights).read_bytes() == (
    whole.workdir / weights
  ).read_bytes()
  # Finished, it gives the same again.
  assert training.train(longer, silent) == training.train(whole, silent)


def test_a_run_goes_on_with_another_rate(home, short):
  other = dataclasses.replace(OPTIONS, steps=5, learning_rate=0.5, warmup=0)
  start = str(short / "checkpoints" / "4")
  run = run_of(home, "rate", other, start=start)
  training.train(run, silent)
  (row,) = rows_of(run.workdir)
  assert row["step"] == 4 and row["learning_rate"] == pytest.approx(0.5)


def test_a_model_is_fine_tuned_with_its_own_tokenizer(home, short):
  options = Options(
    length=16, batch=4, steps=1, eval_windows=4, learning_rate=0.0, warmup=0
  )
  run = run_of(
    home, "tuned", options, text="other.txt", start=str(short / "model")
  )
  said = []
  training.train(run, said.append)
  assert said[0].startswith("transformer, ")
  before = convert.load(short / "model")
  after = convert.load(run.workdir / "model")
  assert before.config == after.config
  # At a rate of 0 weights stay as they are.
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
  one, other = map(tokenizer_lib.load_tokenizer, (before, after))
  assert one.backend.to_str() == other.backend.to_str()
  assert json.loads((run.workdir / "flags.json").read_text())["start"]
  assert "Start: " in (run.workdir / "report.md").read_text()
  # A model without a tokenizer is given one.
  (run.workdir / "model/tokenizer.json").unlink()
  with pytest.raises(InputError, match="give --tokenizer"):
    starting.model(str(run.workdir / "model"), options)
  given = dataclasses.replace(options, tokenizer="bytes")
  _, _, found = starting.model(str(run.workdir / "model"), given)
  assert found.vocab_size == 257


@pytest.mark.parametrize(
  "start, changes, text, says",
  [
    ("short", {"steps": 4}, "text.txt", "--steps=4: .* has 4 updates behind"),
    (
      "short",
      {"steps": 8, "d_model": 32},
      "text.txt",
      "--d_model is 32, but 16",
    ),
    ("short", {"steps": 8}, "other.txt", "--text is .*other.*text.txt"),
    ("short/model", {}, "text.txt", "--layers=1: .* brings its own"),
    ("nowhere", {}, "text.txt", "brings its own|no such model"),
  ],
)
def test_what_does_not_fit_is_told(home, short, start, changes, text, says):
  options = dataclasses.replace(OPTIONS, **changes)
  run = run_of(home, "wrong", options, text, start=str(home / start))
  with pytest.raises(InputError, match=says):
    training.train(run, silent)
  assert not run.workdir.exists()


def test_a_window_longer_than_the_model_is_told(home, short):
  run = run_of(
    home, "long", Options(length=32, batch=4), start=str(short / "model")
  )
  with pytest.raises(InputError, match="--length=32: .* has 16 positions"):
    training.train(run, silent)


def test_the_process_that_writes_tells_the_others_what_is_kept(monkeypatch):
  flags = dataclasses.asdict(OPTIONS)
  told = iter([(Checkpointer("nowhere"), 3), flags | {"text": "a"}])
  monkeypatch.setattr(processes, "from_writer", lambda function: next(told))
  starting.check("nowhere", flags | {"text": "a", "steps": 4})
  assert not [*told]
