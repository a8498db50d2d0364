"""Three disjoint parts of a table."""

import dataclasses

import numpy as np

from models.errors import InputError
from research.predictors.tables import Table


@dataclasses.dataclass(frozen=True)
class Split:
  """Indices of three disjoint parts of a table."""

  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray


def split(
  table: Table,
  *,
  train: float,
  valid: float,
  seed: int,
  by_group: bool = False,
  test: int | None = None,
) -> Split:
  """Cuts a table at random.

  Args:
    table: the table.
    train: share of the rows below 1, else their number.
    valid: likewise.
    seed: of the order.
    by_group: keep groups together; numbers count groups then.
    test: rows (or groups) at most; None takes all that are left.

  Raises:
    InputError: there are too few.
  """
  names = list(table.groups) if by_group else list(range(len(table)))
  distinct = sorted(set(names))
  order = np.random.default_rng((seed, 17)).permutation(len(distinct))
  counts = [
    round(part * len(distinct)) if part < 1 else int(part)
    for part in (train, valid)
  ]
  left = len(distinct) - sum(counts)
  if counts[0] < 1 or left < 1:
    raise InputError(
      f"{len(distinct)} {'groups' if by_group else 'rows'} cannot be cut into "
      f"{counts[0]} for training, {counts[1]} for validation and the rest for "
      "the test: give more rows, or other --train and --valid"
    )
  counts.append(left if test is None else min(test, left))
  part_of = {}
  start = 0
  for part, count in enumerate(counts):
    for place in order[start : start + count]:
      part_of[distinct[place]] = part
    start += count
  parts = np.array([part_of.get(name, -1) for name in names])
  rows = [np.flatnonzero(parts == part) for part in range(3)]
  # Each part is shuffled, so that its order has nothing to do with the file's.
  shuffle = np.random.default_rng((seed, 18))
  return Split(*(shuffle.permutation(part) for part in rows))


def named_split(
  table: Table, name: str, *, seed: int, train: int = 0, test: int = 0
) -> Split:
  """A split that the data brings with it.

  Args:
    table: the table.
    name: of the split.
    seed: of the order, and of what is left out.
    train: rows for training at most; 0 takes all.
    test: likewise.

  Raises:
    InputError: the data has no such split, or a part of it is empty.
  """
  if name not in table.parts:
    known = ", ".join(table.parts) or "none"
    raise InputError(f"--split={name}: the data has {known}")
  parts = np.array(table.parts[name])
  generator = np.random.default_rng((seed, 19))
  rows = [
    generator.permutation(np.flatnonzero(parts == part))
    for part in ("train", "valid", "test")
  ]
  if not len(rows[0]) or not len(rows[2]):
    raise InputError(f"--split={name}: no row is for training, or for the test")
  return Split(rows[0][: train or None], rows[1], rows[2][: test or None])


def repeats(table: Table, parts: Split) -> int:
  """Test rows whose text is that of a row for training or validation."""
  known = {table.texts[i] for part in (parts.train, parts.valid) for i in part}
  return sum(table.texts[i] in known for i in parts.test)
