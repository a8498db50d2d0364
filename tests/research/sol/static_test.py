import numpy as np
import pytest

from research.sol import cost, static
from research.sol import windows as windows_lib
from research.sol.static import Tried
from tests.research.sol import toy


def test_static_baselines_have_every_level():
  table = static.every_level(toy.TABLE)
  for axis in ("kappa", "rho", "bits"):
    assert set(toy.TABLE.levels(axis)) <= set(table.levels(axis))
  assert table.size == 10 * 13 * 12  # those of the toy are published ones
  points = set(zip(table.kappa, table.rho, table.bits, strict=True))
  assert set(static.POINTS.values()) <= points


def test_candidates_are_what_some_price_chooses():
  costs = np.linspace(0, 1, 200)
  gains = np.sqrt(costs)
  gains[::2] -= 0.5  # worse than their neighbours at any price
  found = static.candidates(costs, gains, costs, 60)
  assert {0, 199} <= set(found) and len(found) <= 60
  assert (found[1:-1] % 2 == 1).all()
  np.testing.assert_array_equal(
    static.candidates(costs[:9], gains[:9], costs[:9], 9), np.arange(9)
  )


def test_candidates_that_rounding_alone_tells_apart_are_those_that_keep_most():
  costs = np.repeat(np.linspace(0, 1, 50), 4)
  kept = np.tile([0.2, 0.8, 0.4, 0.6], 50)
  generator = np.random.default_rng(0)
  for _ in range(3):
    gains = np.sqrt(costs) + 1e-8 * generator.normal(size=200)
    found = static.candidates(costs, gains, kept, 30)
    assert (kept[found] == 0.8).all() and {1, 197} <= set(found)


def test_the_hull_falls_and_bends_up():
  costs = np.array([0.2, 0.4, 0.6, 0.8, 1.0, 0.5])
  nll = np.array([9.0, 6.0, 5.9, 3.0, 3.1, 4.0])
  # The third lies above the line; the fifth costs more and is no better.
  assert static.hull(costs, nll, costs).tolist() == [0, 5, 3]


def test_ties_of_the_hull_are_broken_on_purpose():
  costs = np.array([0.4, 0.4, 0.4 + 1e-15, 0.8, 0.8])
  kept = np.array([0.1, 0.7, 0.3, 0.2, 0.9])
  noise = np.array([0, 9e-7, -9e-7, 0, 0])
  for sign in (1, -1):
    # The last is worse by more than rounding, though it keeps more.
    nll = np.array([5.0, 5.0, 5.0, 3.0, 3.001]) + sign * noise
    assert static.hull(costs, nll, kept).tolist() == [1, 3]
  nll = np.array([5.0, 5.0, 5.0, 5.0 - 1e-6, 5.1])
  assert static.hull(costs, nll, kept).tolist() == [1]


@pytest.mark.parametrize("asked, share", [(0.3, 0.5), (0.1, 0.0), (2.0, 1.0)])
def test_schedules_alternate_between_neighbours(asked, share):
  tried = Tried(np.array([7, 3]), np.array([5.0, 8.0]), np.ones(2))
  costs = np.full(8, 9.0)
  costs[[3, 7]] = 0.2, 0.4
  (found,) = tried.schedules(costs, [asked], (2, 5, 4))
  assert (found == 7).mean() == share and (found[found != 7] == 3).all()


def test_one_action_may_be_the_best_at_every_budget():
  tried = Tried(np.array([1, 2]), np.array([5.0, 8.0]), np.ones(2))
  found = tried.schedules(np.array([0.0, 0.3, 0.6]), [0.2, 0.9], (1, 2, 4))
  assert (found == 1).all()


def test_a_search_finds_the_dense_action_the_best():
  setup = toy.setup()
  text = windows_lib.whole(np.asarray(toy.windows(3)), toy.LAYOUT)
  found = static.search(
    setup,
    toy.lm(),
    text,
    [cost.net_keep(toy.TABLE)],
    window_batch=3,
    max_rows=64,
    divergence=True,
    most=99,
    progress=lambda label, total: lambda tokens: None,
  )
  np.testing.assert_array_equal(found.actions, np.arange(8))
  assert found.nll[toy.TABLE.full_index] == pytest.approx(0, abs=1e-5)
  assert (found.nll[:7] > 1e-3).all()
