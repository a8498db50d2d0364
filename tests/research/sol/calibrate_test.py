import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from research.sol import actions, calibrate
from research.sol.controllers import TwoLevels
from research.sol.rollout import Controller
from tests.research.sol import toy

KNOBS = np.geomspace(0.1, 100.0, 13)
FALLING = 1 / (1 + KNOBS)


def test_a_knob_of_a_monotone_curve():
  np.testing.assert_allclose(
    calibrate.knob_for(FALLING, KNOBS, FALLING), KNOBS, rtol=1e-12
  )
  middle = np.sqrt(KNOBS[3] * KNOBS[4])
  asked = [(FALLING[3] + FALLING[4]) / 2]
  found = calibrate.knob_for(asked, KNOBS, FALLING)
  np.testing.assert_allclose(found, middle, rtol=1e-12)


def test_knobs_stay_in_the_measured_range():
  found = calibrate.knob_for([2.0, -1.0], KNOBS, FALLING)
  np.testing.assert_allclose(found, [KNOBS[0], KNOBS[-1]])


def test_noise_does_not_turn_the_order():
  noise = np.random.default_rng(0).normal(size=KNOBS.size) * 0.02
  asked = np.linspace(0.05, 0.85, 50)
  found = calibrate.knob_for(asked, KNOBS, FALLING + noise)
  assert (np.diff(found) <= 0).all()
  # What the found knob would really spend is near what was asked.
  np.testing.assert_allclose(1 / (1 + found), asked, atol=0.06)


def test_a_plateau_gives_a_knob_of_it():
  spent = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
  (found,) = calibrate.knob_for([0.5], np.geomspace(1, 16, 5), spent)
  assert 2 <= found <= 8


def three(share):
  table = actions.preset("J-3L")
  low = np.array([0.1, 0.4, 5 / 16])
  high = np.array([0.6, 0.8, 7 / 16])
  return TwoLevels.around(table, low + share * (high - low))


def test_bracket_moves_only_axes_that_are_mixed():
  one = three(0.5)
  end = TwoLevels.around(actions.preset("J-3L"), np.array([1.0, 0.42, 0.37]))
  doubled, shares = calibrate.bracket([one, end], 0.1)
  assert doubled == [one, one, end, end]
  np.testing.assert_allclose(shares[0], one.shares - 0.1)
  np.testing.assert_allclose(shares[1], one.shares + 0.1)
  assert shares[2, 0] == shares[3, 0] == 1
  np.testing.assert_allclose(shares[2, 1], max(end.shares[1] - 0.1, 0))
  assert shares.min() >= 0 and shares.max() <= 1


def test_thresholds_meet_shares_of_scores_that_stand_still():
  scores = np.random.default_rng(0).normal(size=(1000, 3))
  levels, shares = [three(0.5)] * 2, np.array([[0.2, 0.5, 0.9], [0, 1, 0.5]])
  goals = []

  def run(goal):
    goals.append(goal)
    return np.stack([scores, scores])

  goal = calibrate.thresholds_for(run, levels, shares, scores, rounds=2)
  assert len(goals) == 2
  assert goal.thresholds.shape == (2, 3) and goal.lookup.shape == (2, 8)
  upper = scores[None] >= goal.thresholds[:, None]
  np.testing.assert_allclose(upper.mean(1), shares, atol=2e-3)
  assert goal.thresholds.dtype == np.float32


def test_thresholds_follow_scores_that_actions_change():
  """Frugal tokens leave larger scores, as surprise does."""
  base = np.random.default_rng(1).normal(size=(4000, 3))
  shares = np.array([[0.3, 0.5, 0.7]])

  def run(goal):
    frugal = base < goal.thresholds[0]
    return (base + 0.5 * frugal.mean(0))[None]

  def error(goal):
    reached = run(goal)[0] >= goal.thresholds[0]
    return np.abs(reached.mean(0) - shares[0]).max()

  fixed = calibrate.thresholds_for(run, [three(0.5)], shares, base, rounds=0)
  moved = calibrate.thresholds_for(run, [three(0.5)], shares, base, rounds=6)
  assert error(moved) < 0.1 * error(fixed)


def test_run_points_plays_every_point_on_all_episodes():
  """The goal is the action, so each point shows where it went."""
  controller = Controller(
    start=lambda params, goal: (),
    act=lambda params, goal, carry, seen, key: (
      goal["action"] + params,
      carry,
      {"embed": seen.embed[..., 0]},
    ),
  )
  goals = {"action": np.array([1, 4, 6], np.int32)}
  windows = np.asarray(toy.windows(5))
  found = calibrate.run_points(
    toy.setup(),
    toy.lm(),
    windows,
    toy.LAYOUT.starts(),
    controller,
    jnp.int32(1),
    goals,
    batch=2,
  )
  # Five windows are cut down to four.
  episodes = 4 * toy.LAYOUT.episodes
  assert found.actions.shape == (3, episodes, toy.HORIZON)
  assert toy.TABLE.full_index == 7
  for played, action in zip(found.actions, (2, 5, 7)):
    np.testing.assert_array_equal(played, action)
  read = np.stack([w[s : s + 8] for w in windows[:4] for s in (16, 24, 32)])
  first = np.asarray(toy.lm()["embed"]["table"])[read, 0]
  for point in found.extras["embed"]:
    np.testing.assert_allclose(point, first, rtol=1e-6)
  # The last action is the dense one.
  logits = language_model.forward(
    toy.CONFIG, toy.lm(), jnp.asarray(windows[:4])
  )
  dense = np.asarray(jax.nn.log_softmax(logits))
  for episode, (row, start) in enumerate(
    (row, start) for row in range(4) for start in (16, 24, 32)
  ):
    at = np.arange(start, start + toy.HORIZON)
    np.testing.assert_allclose(
      found.log_p[2, episode],
      dense[row, at, windows[row, at + 1]],
      rtol=0,
      atol=1e-4,
    )
  assert jax.tree.leaves(found.observations) == []


def test_every_pair_of_levels_needs_its_shares():
  with pytest.raises(ValueError):
    calibrate.thresholds_for(
      lambda goal: None, [three(0.5)], np.ones((2, 3)), np.zeros((4, 3))
    )
