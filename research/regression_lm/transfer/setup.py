"""What a transfer comparison compares, on which rows, and what it finds.

Axis letters: E members of an ensemble, N examples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from models.errors import InputError
from research.predictors.text_forms import Facts
from research.regression_lm.batched_training import Updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A column to predict.

  Attributes:
    column: its name.
    form: text form that it is read from.
  """

  column: str
  form: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """What is compared.

  Attributes:
    targets: tasks with few numbers.
    sources: tasks with many; none trains from scratch.
    sizes: numbers of training examples.
    seeds: splits.
    tests: test rows at most, the same for all sizes.
    source_rows: rows whose source numbers are known, none of them tested; 0
      for all rows, tested ones among them.
    ensemble: E.
    views: orders of a text's fields in training.
    test_views: orders whose probabilities are averaged.
    size: changes of the config "tiny".
    vocab_size: of the BPE.
    max_length: tokens of a text.
    digits: decimal digits of a rank.
    grid: numbers that stand for all in expected values.
    pretraining: of the sources.
    training: by size, of the targets.
  """

  targets: Sequence[Task]
  sources: Sequence[Task] = ()
  sizes: Sequence[int]
  seeds: int = 3
  tests: int = 3000
  source_rows: int = 0
  ensemble: int = 8
  views: int = 8
  test_views: int = 4
  size: dict[str, int] = dataclasses.field(default_factory=dict)
  vocab_size: int = 512
  max_length: int = 128
  digits: int = 2
  grid: int = 33
  pretraining: Updates | None = None
  training: dict[int, Updates]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Rows of a seed: tested, and known in order; the first N are examples."""

  test: np.ndarray
  known: np.ndarray


def splits(setup: Setup, facts: Facts) -> list[Split]:
  """One for each seed.

  Raises:
    InputError: there are too few rows.
  """
  values = np.stack([facts.column(t.column) for t in setup.targets])
  there = np.flatnonzero(np.isfinite(values).all(axis=0))
  wanted = max(*setup.sizes, setup.source_rows, 2)
  count = min(setup.tests, len(there) - wanted)
  if count < 2:
    raise InputError(
      f"{len(there)} rows leave no test beside {wanted}: take smaller --sizes"
    )
  found = []
  for seed in range(setup.seeds):
    order = there[np.random.default_rng((seed, 31)).permutation(len(there))]
    found.append(Split(order[:count], order[count:]))
  return found


def source_rows(setup: Setup, facts: Facts, split: Split) -> np.ndarray:
  """Rows whose source numbers are known."""
  if setup.source_rows:
    return split.known[: setup.source_rows]
  return np.arange(len(next(iter(facts.columns.values()))))


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """Predictions of a method for one target, size and seed.

  Attributes:
    points: (tests,).
    draws: (tests, draws), quantiles of the distribution; points where a method
      has none.
  """

  points: np.ndarray
  draws: np.ndarray
