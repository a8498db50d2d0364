import numpy as np
import pytest

from models.errors import InputError
from research.text import packing


def corpus(count=103, starts=(0, 20, 21, 60)):
  return packing.Corpus(
    tokens=np.arange(count, dtype=np.uint16),
    starts=np.asarray(starts, np.int64),
    digest="x",
  )


def test_windows_hold_tokens_and_their_documents():
  found = corpus().windows(np.array([0, 15, 58]), 8)
  assert found["tokens"].shape == (3, 9)
  assert found["tokens"].dtype == found["segment_ids"].dtype == np.int32
  np.testing.assert_array_equal(found["tokens"][:, 0], [0, 15, 58])
  np.testing.assert_array_equal(np.diff(found["tokens"]), 1)
  np.testing.assert_array_equal(
    found["segment_ids"],
    [[0] * 8, [0, 0, 0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1]],
  )


def test_batches_are_a_function_of_step_and_seed():
  batches = packing.Batches(corpus=corpus(), rows=4, length=8)
  first = [batches.batch_at(step, 5)["tokens"] for step in range(9)]
  # Asked in another order, and by another object.
  again = packing.Batches(corpus=corpus(), rows=4, length=8)
  for step in (8, 0, 3, 3):
    np.testing.assert_array_equal(
      again.batch_at(step, 5)["tokens"], first[step]
    )
  other = batches.batch_at(0, 6)["tokens"]
  assert not np.array_equal(other, first[0])


def test_every_window_comes_once_an_epoch_in_a_new_order():
  batches = packing.Batches(corpus=corpus(), rows=4, length=8)
  assert batches.per_epoch == 11
  drawn = np.concatenate(
    [batches.batch_at(step, 1)["tokens"] for step in range(11)]
  )
  epochs = drawn.reshape(4, 11, 9)
  orders, offsets = set(), set()
  for epoch in epochs:
    starts = np.sort(epoch[:, 0])
    np.testing.assert_array_equal(np.diff(starts), 8)
    offsets.add(int(starts[0]))
    orders.add(tuple(epoch[:, 0] // 8))
  assert len(orders) == 4 and len(offsets) > 1
  assert max(offsets) < 8


def test_a_batch_may_be_larger_than_an_epoch():
  batches = packing.Batches(corpus=corpus(), rows=24, length=8)
  found = batches.batch_at(0, 1)["tokens"]
  _, counts = np.unique(found[:11, 0], return_counts=True)
  assert found.shape == (24, 9) and (counts == 1).all()


def test_held_out_windows_share_no_target_and_are_padded():
  found = packing.held_out(corpus(), rows=5, length=8)
  assert [batch["tokens"].shape for batch in found] == [(5, 9)] * 3
  segments = np.concatenate([batch["segment_ids"] for batch in found])
  tokens = np.concatenate([batch["tokens"] for batch in found])
  counted = segments[:, 0] >= 0
  assert counted.sum() == 12 and counted[:12].all()
  assert (segments[~counted] == -1).all()
  np.testing.assert_array_equal(
    tokens[counted][:, 1:].reshape(-1), np.arange(1, 97)
  )


def test_fewer_held_out_windows_are_spread_evenly():
  (found,) = packing.held_out(corpus(), rows=4, length=8, most=3)
  np.testing.assert_array_equal(found["tokens"][:3, 0], [0, 32, 64])
  assert (found["segment_ids"][3] == -1).all()


def test_split_keeps_documents():
  head, tail = corpus().split(0.5)
  np.testing.assert_array_equal(head.starts, [0, 20, 21])
  np.testing.assert_array_equal(tail.starts, [60 - 51])
  np.testing.assert_array_equal(
    np.concatenate([head.tokens, tail.tokens]), corpus().tokens
  )


def test_unigram_entropy():
  tokens = np.array([0] * 4 + [1] * 2 + [3] * 2)
  found = packing.Corpus(tokens=tokens, starts=np.zeros(1, int), digest="x")
  # Half, a quarter and a quarter: 1.5 bits.
  assert found.unigram_entropy(5) == pytest.approx(1.5 * np.log(2), rel=1e-12)


def test_too_short_texts_are_told():
  with pytest.raises(InputError, match="--length=64 needs 128"):
    packing.Batches(corpus=corpus(), rows=1, length=64)
  with pytest.raises(InputError, match="--length=103 needs 104"):
    packing.held_out(corpus(), rows=1, length=103)
