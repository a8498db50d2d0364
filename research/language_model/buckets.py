"""Few shapes for many lengths: every shape is one more compilation."""

from collections.abc import Iterator, Sequence

import numpy as np


def round_up(length: int, smallest: int = 16) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: at most half is padding."""
  size = smallest
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def power_of_two(count: int) -> int:
  """The next power of two."""
  return 1 << max(0, count - 1).bit_length()


def batches(
  lengths: Sequence[int], max_tokens: int, largest: int | None = None
) -> Iterator[tuple[int, int, list[np.ndarray]]]:
  """Groups rows of like length, the longest first.

  Args:
    lengths: of the rows.
    max_tokens: padding included, a batch has at most so many; one row may have
      more.
    largest: no length is rounded up beyond it.

  Yields:
    (T, B, batches): the padded length, the rows of a batch, and the indices
    (<= B,) of each batch. Every T comes once.
  """
  sizes: dict[int, list[int]] = {}
  for index, length in enumerate(lengths):
    size = round_up(length)
    if largest is not None and length <= largest:
      size = min(size, largest)
    sizes.setdefault(size, []).append(index)
  for size in sorted(sizes, reverse=True):
    found = sizes[size]
    most = max(1, max_tokens // size)
    rows = min(power_of_two(len(found)), 1 << (most.bit_length() - 1))
    cuts = range(0, len(found), rows)
    yield size, rows, [np.asarray(found[i : i + rows]) for i in cuts]
