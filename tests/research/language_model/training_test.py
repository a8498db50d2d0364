import dataclasses

import jax
import pytest

from models import convert, language_model
from models.errors import InputError
from research.core import mesh as mesh_lib
from research.core import metrics
from research.language_model import architectures, training
from research.language_model.options import Options


@pytest.mark.parametrize(
  "options, says",
  [
    ({"batch": 12}, "--batch=12 is no multiple of 8 parts of rows"),
    ({"batch": 16, "accumulate": 4}, "8 parts of rows times --accumulate=4"),
    ({"batch": 16, "tokenizer": "none"}, "--tokenizer=none"),
    ({"batch": 16, "tokenizer": "bytes", "d_ff": 0}, "--d_ff=0"),
    ({"batch": 16, "tokenizer": "bytes"}, "no_such.txt"),
  ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, options, says):
  run = training.Run(
    options=Options(**options),
    text=["no_such.txt"],
    workdir=tmp_path / "run",
    cache=tmp_path / "cache",
    mesh=mesh_lib.data_mesh(8),
  )
  with pytest.raises(InputError, match=says):
    training.train(run, print)
  assert not list(tmp_path.iterdir())


def test_a_result_says_whether_it_beats_unigrams():
  good = "\n".join(training.Result(2.0, 3.0, 1).lines())
  assert "perplexity 7.389" in good and "is below it" in good
  assert "NOT below" in training.Result(3.5, 3.0, 1).lines()[1]


def small_run(tmp_path, line, **sizes):
  """A run of a few updates on a text of one line, again and again."""
  text = tmp_path / "text.txt"
  text.write_text(line * 200)
  options = Options(
    tokenizer="bytes",
    d_model=16,
    heads=2,
    length=16,
    batch=4,
    steps=12,
    learning_rate=0.03,
    warmup=2,
    eval_windows=2,
    dtype="float32",
    **sizes,
  )
  return training.Run(
    options=options,
    text=[str(text)],
    workdir=tmp_path / "run",
    cache=tmp_path / "cache",
    mesh=mesh_lib.data_mesh(1),
    progress=False,
  )


def test_a_hybrid_is_trained_and_read_again(tmp_path):
  run = small_run(
    tmp_path, "abcdefgh\n", arch="hybrid", layers=2, kv_heads=1, d_state=8,
    head_dim=16,
  )  # fmt: skip
  said = []
  result = training.train(run, said.append)
  assert "hybrid" in said[0] and "unigram entropy" in said[1]
  first = metrics.read_jsonl(run.workdir / "metrics.jsonl")[0]
  assert result.eval_loss < first["loss"] - 0.5
  checkpoint = convert.load(run.workdir / "model")
  # It is written without the rows that pad the vocabulary.
  trained = architectures.config_of(run.options, 257)
  assert checkpoint.config == dataclasses.replace(trained, vocab_multiple=1)
  sizes = [leaf.size for leaf in jax.tree.leaves(checkpoint.params)]
  assert sum(sizes) == language_model.num_params(checkpoint.config)
  assert result.num_params == language_model.num_params(trained)
  # A finished run is not trained again, and gives the same result.
  assert training.train(run, said.append) == result


def test_an_attamba_learns_where_its_chunks_end(tmp_path):
  """Its tokens' costs are made of the text, stay as they are, and are kept."""
  run = small_run(
    tmp_path, "abcdefg.\n", arch="attamba", layers=1, d_ff=16, kv_heads=2,
    compressor="mean", boundaries="token_class", window=2,
  )  # fmt: skip
  result = training.train(run, lambda line: None)
  first = metrics.read_jsonl(run.workdir / "metrics.jsonl")[0]
  assert result.eval_loss < first["loss"] - 0.5
  checkpoint = convert.load(run.workdir / "model")
  costs = checkpoint.params["chunk_costs"]
  assert costs[ord(".")] == costs[ord("\n")] == 1
  assert costs[ord("a")] == costs[ord("G")] == 0
