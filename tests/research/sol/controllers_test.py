import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.sol import actions, controllers
from research.sol.controllers import ThresholdGoal, TwoLevels
from research.sol.observation import SCALARS, Observation
from tests.research.sol import toy

TABLE = actions.preset("J-3L")
COSTS = np.stack([TABLE.kappa, TABLE.rho, np.asarray(TABLE.bits) / 16], axis=-1)
MEANS = [(0.37, 0.9, 0.4), (0.6, 0.4, 1.0), (0.101, 0.999, 7 / 16)]


def widths(levels):
  """Distance of the two levels of each axis, in cost."""
  return COSTS[levels.lookup[7]] - COSTS[levels.lookup[0]]


@pytest.mark.parametrize("means", MEANS)
def test_levels_are_neighbours_that_mix_to_the_means(means):
  levels = TwoLevels.around(TABLE, np.array(means))
  low, high = COSTS[levels.lookup[0]], COSTS[levels.lookup[7]]
  mixed = low + levels.shares * (high - low)
  np.testing.assert_allclose(mixed, means, atol=1e-12)
  for axis, name in enumerate(controllers.AXES):
    all_levels = np.array(TABLE.levels(name)) / (16 if name == "bits" else 1)
    between = (all_levels > low[axis]) & (all_levels < high[axis])
    assert not between.any()


def test_corners_are_named_by_three_bits():
  levels = TwoLevels.around(TABLE, np.array(MEANS[0]))
  low, high = COSTS[levels.lookup[0]], COSTS[levels.lookup[7]]
  for corner in range(8):
    upper = np.array([corner >> 2 & 1, corner >> 1 & 1, corner & 1], bool)
    np.testing.assert_array_equal(
      COSTS[levels.lookup[corner]], np.where(upper, high, low)
    )
    assert levels.pick(upper) == levels.lookup[corner]


@pytest.mark.parametrize(
  "means, expected",
  [
    (COSTS.max(0), COSTS.max(0)),
    (COSTS.min(0), COSTS.min(0)),
    (np.array([2.0, 2.0, 2.0]), COSTS.max(0)),
    (np.zeros(3), COSTS.min(0)),
  ],
)
def test_means_at_the_ends_and_beyond(means, expected):
  levels = TwoLevels.around(TABLE, means)
  assert set(levels.shares) <= {0.0, 1.0}
  for schedule in (
    controllers.round_robin(levels, (5, 2, 4)),
    controllers.random_schedule(levels, (5, 2, 4), seed=0),
  ):
    np.testing.assert_allclose(
      COSTS[schedule], np.broadcast_to(expected, (5, 2, 4, 3))
    )


def test_an_axis_of_one_level_stays_there():
  table = actions.preset("K10")
  levels = TwoLevels.around(table, np.array([0.55, 1.0, 1.0]))
  schedule = controllers.round_robin(levels, (4, 1, 8))
  np.testing.assert_allclose(np.take(table.kappa, schedule).mean(), 0.55)
  np.testing.assert_array_equal(np.take(table.rho, schedule), 1)
  np.testing.assert_array_equal(np.take(table.bits, schedule), 16)


@pytest.mark.parametrize("means", MEANS)
def test_round_robin_meets_every_mean_to_one_token(means):
  levels = TwoLevels.around(TABLE, np.array(means))
  schedule = controllers.round_robin(levels, (7, 3, 8))
  assert schedule.dtype == np.int32
  found = COSTS[schedule].reshape(-1, 3)
  for count in (len(found), 40):
    # A count of upper levels is within one of what was asked, from any start.
    error = np.abs(found[:count].mean(0) - means)
    np.testing.assert_array_less(error, widths(levels) / count + 1e-9)


@pytest.mark.parametrize("means", MEANS)
def test_random_schedules_have_floor_or_ceil_in_every_episode(means):
  levels = TwoLevels.around(TABLE, np.array(means))
  shape = (7, 3, 8)
  schedule = controllers.random_schedule(levels, shape, seed=3)
  low, high = COSTS[levels.lookup[0]], COSTS[levels.lookup[7]]
  upper = COSTS[schedule] > (low + high) / 2
  counts = upper.sum(-2)
  target = levels.shares * shape[-1]
  assert ((counts == np.floor(target)) | (counts == np.ceil(target))).all()
  error = np.abs(COSTS[schedule].reshape(-1, 3).mean(0) - means)
  np.testing.assert_array_less(error, widths(levels) / (7 * 3 * 8) + 1e-9)


def test_random_schedules_are_seeded_and_spread():
  levels = TwoLevels.around(TABLE, np.array([0.35, 0.6, 6 / 16]))
  draw = lambda seed: controllers.random_schedule(levels, (50, 2, 8), seed)
  np.testing.assert_array_equal(draw(1), draw(1))
  assert np.any(draw(1) != draw(2))
  high = COSTS[levels.lookup[7]]
  at_step = (COSTS[draw(1)] == high).mean((0, 1))
  # Each step has the upper level half of the time: 100 draws, 5 sigma.
  np.testing.assert_allclose(at_step, 0.5, atol=0.25)


def observation(shape, key=0):
  generator = np.random.default_rng(key)
  make = lambda *tail: jnp.asarray(
    generator.normal(size=(*shape, *tail)), jnp.float32
  )
  return Observation(
    hidden=make(4),
    embed=make(4),
    scalars=make(len(SCALARS)),
    drift=make(),
    previous=jnp.zeros(shape, jnp.int32),
    spent=make(3),
    step=jnp.ones(shape, jnp.int32),
  )


@pytest.mark.parametrize("name", controllers.SCORES)
def test_a_threshold_raises_its_axis_where_the_score_reaches_it(name):
  seen = observation((3, 4))
  levels = TwoLevels.around(TABLE, np.array(MEANS[0]))
  thresholds = np.array([-0.3, 0.0, np.inf], np.float32)
  goal = ThresholdGoal(
    jnp.broadcast_to(thresholds, (3, 4, 3)),
    jnp.broadcast_to(levels.lookup, (3, 4, 8)),
  )
  controller = controllers.threshold_controller()
  place = list(controllers.SCORES).index(name)
  carry = controller.start(place, goal)
  action, _, scores = controller.act(
    place, goal, carry, seen, jax.random.key(0)
  )
  source = {
    "surprise": seen.scalars[..., SCALARS.index("surprise")],
    "entropy": seen.scalars[..., SCALARS.index("entropy")],
    "hidden drift": seen.drift,
  }[name]
  expected = np.broadcast_to(np.asarray(source)[..., None], (3, 4, 3))
  np.testing.assert_array_equal(scores, expected)
  np.testing.assert_array_equal(action, levels.pick(expected >= thresholds))
  assert action.dtype == jnp.int32


def test_replay_plays_the_schedule():
  schedule = jnp.arange(12).reshape(2, 3, 2)
  controller = toy.replay_controller(schedule)
  seen = observation((2, 3))
  action, _, _ = controller.act(None, None, (), seen, jax.random.key(0))
  np.testing.assert_array_equal(action, schedule[..., 1])
