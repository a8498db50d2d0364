"""Texts that ask for what stood in them, and members trained on them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from research.core import intervals, metrics
from research.language_model import recall, recall_report, recalling
from research.language_model.options import Options
from research.language_model.recall import Task, answers, texts
from research.results.recall import table as recall_table

VOCAB, LENGTH = 257, 63
THIRD = (VOCAB - 2) // 3


def kind(tokens):
  """0 for marks, 1 for keys, 2 for values, 3 for filler."""
  return np.where(tokens < 2, 0, 1 + (tokens - 2) // THIRD)


def drawn(task, pairs=6, vary=False, key=(0, 0), length=LENGTH):
  return texts(Task(task=task), key, 40, length, pairs, VOCAB, vary=vary)


@pytest.mark.parametrize("vary", [False, True])
def test_pairs_are_asked_once_and_answered(vary):
  batch = drawn("pairs", vary=vary)
  tokens, asked = batch["tokens"], batch["segment_ids"] >= 0
  assert tokens.shape == (40, LENGTH + 1) and asked.shape == (40, LENGTH)
  counts = asked.sum(1)
  assert (counts == 6).all() if not vary else len(set(counts)) > 3
  for row, places in zip(tokens, map(np.flatnonzero, asked), strict=True):
    keys = np.flatnonzero(kind(row) == 1)
    # First all pairs, then each key once more, with the same value.
    first, again = np.split(keys, 2)
    assert again.tolist() == places.tolist()
    assert np.diff(first).tolist() == [2] * (len(first) - 1)
    told = dict(zip(row[first], row[first + 1], strict=True))
    assert len(told) == len(first)
    assert [told[row[place]] for place in places] == row[places + 1].tolist()
    rest = np.delete(kind(row), np.concatenate([keys, keys + 1]))
    assert (kind(row[keys + 1]) == 2).all() and (rest == 3).all()


@pytest.mark.parametrize("pairs", [1, 10])
def test_needles_are_asked_at_the_end(pairs):
  batch = drawn("needle", pairs, length=127)
  places, right = answers(batch)
  questions = min(pairs, 8)
  assert places.shape == right.shape == (40, 2 * questions)
  starts = []
  for row, own in zip(batch["tokens"], places, strict=True):
    facts = np.flatnonzero(row == recall.FACT)
    starts += facts.tolist()
    told = {row[at + 1]: row[at + 2 : at + 4].tolist() for at in facts}
    assert len(facts) == len(told) == pairs
    asked = np.flatnonzero(row == recall.ASKED)
    assert asked.tolist() == list(range(128 - 4 * questions, 128, 4))
    assert own.tolist() == [at + i for at in asked for i in (1, 2)]
    for at in asked:
      assert row[at + 2 : at + 4].tolist() == told[row[at + 1]]
  # Facts lie anywhere, at any place of a chunk.
  assert len({at % 8 for at in starts}) == 8


def test_texts_are_functions_of_their_key():
  one, same, other = (
    drawn("needle", 3, key=key) for key in ((1, 2), (1, 2), (1, 3))
  )
  np.testing.assert_array_equal(one["tokens"], same["tokens"])
  assert (one["tokens"] != other["tokens"]).any()


@pytest.mark.parametrize("task", recall.TASKS)
def test_as_many_pairs_as_there_is_room_for(task):
  most = Task(task=task).most_pairs(LENGTH)
  assert answers(drawn(task, most))[0].size
  with pytest.raises(InputError, match=f"but {most} do"):
    drawn(task, most + 1)


def test_too_few_tokens():
  with pytest.raises(InputError, match="there are 85: take more"):
    drawn("pairs", 90, length=400)
  with pytest.raises(InputError, match="has 85: take fewer"):
    Task(symbols=86).check(64, 4, VOCAB)
  # Tests are checked in front of the training that they follow.
  with pytest.raises(InputError, match="16 pairs want as many keys"):
    Task(symbols=8).tests((256,), (4, 16), VOCAB)
  with pytest.raises(InputError, match="fit into none"):
    Task().tests((32, 40), (64,), VOCAB)
  assert Task().tests((32, 64), (4, 9), VOCAB) == [(32, 4), (64, 4), (64, 9)]
  few = texts(Task(symbols=4), (0,), 9, 40, 4, VOCAB, vary=False)
  assert few["tokens"].max() == 2 + 3 * 4 - 1


def test_members_are_trained_and_tested(tmp_path):
  options = Options(
    arch="transformer", layers=1, d_model=16, d_ff=16, heads=2, kv_heads=2,
    vocab_size=VOCAB, vocab_multiple=1, length=31, batch=4, steps=2, warmup=1,
    dtype="float32", remat=True, z_loss=1e-3,
  )  # fmt: skip
  run = recalling.Run(
    name="small", options=options, task=Task(pairs=3, test_texts=8),
    seeds=(3, 5), test_lengths=(31, 40), test_pairs=(8,), workdir=tmp_path,
  )  # fmt: skip
  (row,) = recalling.train(run, lambda line: None)
  # Of 31 tokens there is no room for 8 pairs.
  assert (row["length"], row["pairs"], row["seeds"]) == (40, 8, 2)
  first, second = row["each"]
  assert row["value"] == (first + second) / 2
  # Keys and values of 40 tokens in 16 channels of bfloat16, and the length.
  assert row["cache_bytes"] == 2 * 40 * 16 * 2 + 4
  losses = [
    line["losses"] for line in metrics.read_jsonl(tmp_path / "metrics.jsonl")
  ]
  assert losses[0][0] != losses[0][1] and np.isfinite(losses).all()
  assert recalling.train(run, lambda line: None) == [row]


def test_right_answers_are_counted():
  """By a head whose table gives each token the next number."""

  class Next:
    def hidden(self, params, tokens, segment_ids):
      return jax.nn.one_hot(tokens + params, VOCAB)

    def head(self, params):
      return jnp.eye(VOCAB)

  batch = drawn("pairs")
  tokens = batch["tokens"].copy()
  places, _ = answers(batch)
  rows = np.arange(len(tokens))[:, None]
  test = recalling.make_test(Next(), VOCAB)
  right = tokens[rows, places] + 1
  right[: len(right) // 4] = 0
  found = test(jnp.array([1, 2]), tokens[:, :-1], places, right)
  assert np.asarray(found).tolist() == pytest.approx([0.75, 0.0])


def test_interval_of_seeds():
  found = intervals.of_mean([1.0, 2.0, 3.0])
  assert found.value == 2 and abs(found.high - 2 - 4.303 / 3**0.5) < 1e-9
  assert intervals.of_mean([4.0]) == (4, 4, 4)


def test_a_result_without_a_field_is_refused(tmp_path):
  row = {
    "model": "a", "data": "pairs", "value": 0.5, "low": 0.4, "high": 0.6,
    "length": 1024, "pairs": 4, "seeds": 3, "parameters": 12345,
    "cache_bytes": 6789,
  }  # fmt: skip
  origin = {"device": "cpu", "commit": "c", "versions": {}, "seconds": 1.0}
  path = tmp_path / "result.json"
  path.write_text(json.dumps({"rows": [row], **origin}))
  (found,), seconds, _ = recall_report.read([tmp_path])
  assert found == row and seconds == 1.0
  for cell in ("12,345", "6,789", "1,024", "0.500 ± 0.100"):
    assert f"| {cell} " in recall_table([found])
  for name in ("parameters", "cache_bytes"):
    less = {key: value for key, value in row.items() if key != name}
    path.write_text(json.dumps({"rows": [less], **origin}))
    with pytest.raises(InputError, match="no result of train_recall.py"):
      recall_report.read([tmp_path])
