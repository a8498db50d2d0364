"""What a transfer comparison compares, on which rows, and what it finds.

Axis letters: E members of an ensemble, N examples.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from models.errors import InputError
from research.predictors import calibration
from research.predictors.text_forms import Facts
from research.regression_lm.batched_training import Updates
from research.regression_lm.options import LossOptions
from research.regression_lm.transfer.options import Settings


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
    folds: of the examples, each predicted from the others; their errors tell
      how wide intervals must be. 0 for none.
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
  folds: int = 0


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


def folds(setup: Setup, size: int, seed: int) -> list[np.ndarray]:
  """Places of `size` examples, in folds that are left out in turn.

  A fold has two examples at least; fewer than four examples have no folds.
  """
  count = min(setup.folds, size // 2)
  if count < 2:
    return []
  order = np.random.default_rng((seed, 47)).permutation(size)
  return [np.sort(part) for part in np.array_split(order, count)]


def twins(facts: Facts, task: Task, split: Split, size: int) -> np.ndarray:
  """(tests,) bool: an example has the same text of the target's form."""
  told = lambda row: tuple(facts.forms[task.form][row])
  known = {told(row) for row in split.known[:size]}
  return np.array([told(row) in known for row in split.test])


def repeats(setup: Setup, facts: Facts, split: Split) -> int:
  """Test rows of which all that is told is told of an example, too."""
  told = lambda row: tuple(tuple(f[row]) for f in facts.forms.values())
  known = {told(row) for row in split.known[: max(setup.sizes)]}
  return sum(told(row) in known for row in split.test)


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
    atoms: (tests, G) numbers that the distribution is over; the points alone
      where a method has none.
    chances: (tests, G) of the atoms.
    held: of every example, by the method without that example's fold; None
      where there were no folds.
  """

  points: np.ndarray
  atoms: np.ndarray
  chances: np.ndarray
  held: "Found | None" = None

  @classmethod
  def of_points(
    cls, points: np.ndarray, held: np.ndarray | None = None
  ) -> Self:
    """Predictions (tests,), and of examples, without a distribution."""
    of_held = None if held is None else cls.of_points(held)
    return cls(points, points[:, None], np.ones((len(points), 1)), of_held)

  @classmethod
  def joined(cls, parts: Sequence[Self], places: Sequence[np.ndarray]) -> Self:
    """Parts of rows, each at its places in the whole."""
    back = np.argsort(np.concatenate(places))
    fields = zip(*((p.points, p.atoms, p.chances) for p in parts))
    return cls(*(np.concatenate(field)[back] for field in fields))

  def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends (tests,) of the central interval of this probability."""
    low, high = (
      calibration.weighted_quantile(
        self.atoms, self.chances, (1 + side * level) / 2
      )
      for side in (-1, 1)
    )
    return low, high

  def take(self, rows: np.ndarray) -> Self:
    """The predictions of some test rows, by a mask or their places."""
    return dataclasses.replace(
      self,
      points=self.points[rows],
      atoms=self.atoms[rows],
      chances=self.chances[rows],
    )


def make(settings: Settings, *, sizes: Sequence[int], **rest: Any) -> Setup:
  """The comparison that settings and data make.

  Args:
    settings: of the models.
    sizes: numbers of examples.
    **rest: fields of `Setup` that say which rows and tasks.
  """
  s = settings
  heads = s.d_model // 16
  loss = LossOptions(
    expected_value=s.expected_value, ranking=s.ranking, dropout=s.dropout
  )
  # The batch stays as it is where examples are fewer, so that one program
  # serves all sizes: they come again in other views.
  training = {
    size: Updates(
      steps=math.ceil(s.steps_root * math.sqrt(size)),
      batch=s.batch,
      learning_rate=s.learning_rate,
      weight_decay=s.weight_decay,
      loss=loss,
    )
    for size in sizes
  }
  return Setup(
    sizes=sizes,
    ensemble=s.ensemble,
    views=s.views,
    test_views=s.test_views,
    size={
      "encoder_layers": s.encoder_layers,
      "d_model": s.d_model,
      "d_ff": 2 * s.d_model,
      "num_heads": heads,
      "num_kv_heads": heads,
      "head_dim": 16,
    },
    vocab_size=s.vocab_size,
    max_length=s.max_length,
    digits=s.digits,
    grid=s.grid,
    pretraining=Updates(
      steps=s.pretrain_steps,
      batch=s.pretrain_batch,
      learning_rate=s.pretrain_rate,
      warmup=100,
      weight_decay=0.01,
    ),
    training=training,
    folds=s.folds,
    **rest,
  )


def tasks(
  facts: Facts, names: Sequence[str], leave_out: Sequence[str] = ()
) -> list[Task]:
  """Tasks by "column" or "column:form"; "lat_*" stands for many columns.

  Without a form it is the set's first.

  Raises:
    InputError: there is no such column or form.
  """
  hidden = {name.partition(":")[0] for name in leave_out}
  found = []
  for name in names:
    column, _, form = name.partition(":")
    form = form or next(iter(facts.forms))
    if form not in facts.forms:
      raise InputError(f"there is no form {form!r}, but {list(facts.forms)}")
    columns = [column]
    if "*" in column:
      columns = fnmatch.filter(facts.columns, column) or [column]
    for column in columns:
      facts.column(column)
      if column not in hidden:
        found.append(Task(column=column, form=form))
  return found
