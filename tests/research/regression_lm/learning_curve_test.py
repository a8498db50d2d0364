"""Parts of a learning curve."""

import numpy as np
import pytest

from models.errors import InputError
from research.predictors.data_options import DataOptions
from research.predictors.tables import Table
from research.regression_lm import learning_curve
from research.regression_lm.fine_tuning import FineTuneOptions
from research.regression_lm.learning_curve import Curve
from research.regression_lm.options import Options

GROUPS = np.repeat(np.arange(20), 5)


def curve(by_group, **changes):
  fixed = {"model": Options(), "fine_tune": FineTuneOptions(), "peers": []}
  data = DataOptions(kind="csv", targets=("y",), by_group=by_group)
  return Curve(**(fixed | {"data": data, "sizes": [20, 60]} | changes))


@pytest.fixture(scope="module")
def table():
  texts = [f"x {group}" for group in GROUPS]
  return Table(
    texts=texts,
    values=np.zeros((100, 1)),
    targets=["y"],
    groups=texts,
    features=np.zeros((100, 0)),
  )


@pytest.mark.parametrize("by_group", [False, True])
def test_the_test_is_the_same_for_all_sizes(table, by_group):
  few, many = (
    learning_curve.split(curve(by_group), table, size, 1) for size in (20, 60)
  )
  np.testing.assert_array_equal(few.test, many.test)
  assert len(few.train) + len(few.valid) == 20
  assert len(few.valid) == (5 if by_group else 4)
  assert len(many.train) + len(many.valid) == 60
  parts = [set(GROUPS[p]) for p in (many.train, many.valid, many.test)]
  shared = sum(len(a & b) for a in parts for b in parts if a is not b)
  assert (shared == 0) == by_group
  assert set(few.train) <= set(many.train) | set(many.valid)


def test_groups_come_in_a_random_order(table):
  first, second = (
    learning_curve.split(curve(True), table, 20, seed) for seed in (0, 1)
  )
  assert set(first.test) != set(second.test)
  with pytest.raises(InputError, match="smaller --sizes"):
    learning_curve.split(curve(True, sizes=[98]), table, 98, 0)
