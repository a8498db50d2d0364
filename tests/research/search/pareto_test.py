import itertools

import numpy as np
import pytest

from models.errors import InputError
from research.search import pareto


def draws(seed, points, objectives, levels=8):
  """Whole numbers, so that many are equal."""
  rng = np.random.default_rng(seed)
  return rng.integers(levels, size=(points, objectives)).astype(float)


def dominated(one, others):
  return any((o <= one).all() and (o < one).any() for o in others)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_front_is_what_none_dominates(objectives):
  values = draws(objectives, 60, objectives)
  wanted = [at for at, one in enumerate(values) if not dominated(one, values)]
  found = pareto.front(values)
  assert sorted(found) == wanted
  assert (np.diff(values[found, 0]) >= 0).all()


def test_infinite_values_are_never_on_the_front():
  values = np.array([[np.inf, 0.0], [1, 1]])
  assert pareto.front(values).tolist() == [1]
  assert pareto.ranks(values).tolist() == [1, 0]
  assert pareto.front(np.empty((0, 2))).tolist() == []


def test_ranks_peel_fronts():
  values = np.array([[0, 2], [2, 0], [1, 3], [3, 1], [3, 3.0]])
  assert pareto.ranks(values).tolist() == [0, 0, 1, 1, 2]


def test_crowding_keeps_the_ends():
  found = pareto.crowding(np.array([[0.0], [1], [4], [5]]))
  assert found.tolist() == [np.inf, 4, 4, np.inf]
  assert pareto.crowding(np.empty((0, 2))).tolist() == []


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_hypervolume_counts_cells(objectives):
  """Values are whole: the volume is the number of unit cells dominated."""
  side = 6
  values = draws(10 + objectives, 12, objectives, side + 2)
  reference = np.full(objectives, float(side))
  cells = itertools.product(range(side), repeat=objectives)
  wanted = sum((values <= np.array(cell)).all(1).any() for cell in cells)
  assert pareto.hypervolume(values, reference) == wanted


def test_a_large_hypervolume_in_four_objectives():
  """Points of a simplex's face, counted by inclusion of a finer grid."""
  rng = np.random.default_rng(0)
  values = rng.dirichlet(np.ones(4), 120)
  found = pareto.hypervolume(values, np.ones(4))
  drawn = rng.random((20000, 1, 4))
  share = np.mean((values[None] <= drawn).all(2).any(1))
  assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 20000)


def test_regret_and_epsilon():
  best = np.array([[0, 2], [1, 1], [2, 0.0]])
  reference = np.array([3.0, 3])
  assert pareto.regret(best, best, reference) == 0
  assert pareto.epsilon(best, best) == 0
  assert pareto.regret(best[:1], best, reference) == pytest.approx(1 - 3 / 6)
  assert pareto.epsilon(best[:1], best) == 2
  nothing = np.array([[5.0, 5]])
  assert pareto.regret(nothing, best, reference) == 1
  assert pareto.epsilon(np.full((1, 2), np.inf), best) == np.inf


def test_bad_values_are_named():
  with pytest.raises(InputError, match="NaN"):
    pareto.front(np.array([[np.nan]]))
  with pytest.raises(InputError, match="5 objectives"):
    pareto.hypervolume(np.zeros((1, 5)), np.ones(5))
  with pytest.raises(InputError, match="reference"):
    pareto.hypervolume(np.zeros((1, 2)), np.ones(3))
  with pytest.raises(InputError, match="no point"):
    pareto.regret(np.ones((1, 2)), np.ones((1, 2)), np.ones(2))
  with pytest.raises(InputError, match="points, objectives"):
    pareto.ranks(np.ones(3))
