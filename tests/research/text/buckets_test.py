import numpy as np
import pytest

from research.text import buckets


def test_lengths_are_rounded_up_to_few():
  found = [buckets.round_up(n) for n in range(1, 3000)]
  assert all(n <= size for n, size in enumerate(found, 1))
  assert all(size <= max(16, 1.5 * n) for n, size in enumerate(found, 1))
  assert sorted(set(found))[:6] == [16, 24, 32, 48, 64, 96]
  assert len(set(found)) == 16


def test_few_sizes_pad_least():
  lengths = [10] * 50 + [60] * 40 + [70, 300, 310]
  assert buckets.few_sizes(lengths, 2) == (64, 384)
  assert buckets.few_sizes(lengths, 3) == (16, 64, 384)
  assert buckets.few_sizes(lengths, 9) == (16, 64, 96, 384)
  assert buckets.few_sizes([5], 4) == (16,)
  assert buckets.fitting(65, (16, 64, 384)) == 384
  assert buckets.fitting(64, (16, 64, 384)) == 64
  rows = buckets.batches(lengths, 1000, sizes=(64, 384))
  assert [size for size, _, _ in rows] == [384, 64]


def test_powers_of_two():
  found = [buckets.power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1025)]
  assert found == [1, 1, 2, 4, 4, 8, 2048]


@pytest.mark.parametrize("max_tokens", [1, 64, 1000])
def test_every_row_is_in_one_batch_that_it_fits_into(max_tokens):
  lengths = np.random.default_rng(0).integers(1, 300, 200)
  seen, shapes = [], []
  for size, rows, batches in buckets.batches(lengths, max_tokens, 300):
    shapes.append(size)
    assert rows == 1 or rows * size <= max_tokens
    assert size <= 300
    for batch in batches:
      assert 1 <= len(batch) <= rows
      assert lengths[batch].max() <= size
      seen += batch.tolist()
  assert sorted(seen) == list(range(200))
  assert shapes == sorted(set(shapes), reverse=True)
