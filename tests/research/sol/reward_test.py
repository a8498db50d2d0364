import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.sol import reward


def make(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("steps", [1, 5, 64])
@pytest.mark.parametrize("gamma", [0.0, 0.85, 1.0])
def test_returns_follow_the_recursion(steps, gamma):
  rewards = make((2, 3, steps))
  found = jax.jit(lambda r: reward.returns_to_go(r, gamma))(rewards)
  expected = np.zeros((2, 3, steps + 1))
  for t in reversed(range(steps)):
    expected[..., t] = (
      np.float64(rewards[..., t]) + gamma * expected[..., t + 1]
    )
  size = np.abs(rewards).sum(-1).max()
  tolerance = 2 * 2.0**-23 * size
  np.testing.assert_allclose(found, expected[..., :-1], rtol=0, atol=tolerance)


def test_masked_steps_reward_nothing():
  rewards = jnp.asarray([1.0, jnp.nan, 1.0])
  found = reward.returns_to_go(rewards, 0.5, jnp.asarray([1, 0, 1]))
  np.testing.assert_allclose(found, [1.25, 0.5, 1.0])


def test_penalty_is_two_sided_with_a_dead_zone():
  gap = jnp.asarray(
    [[0.02, -0.02, 0.01], [0.12, 0, 0], [-0.12, 0, 0], [0, 0, 0.12]]
  )
  found = reward.dead_zone_penalty(gap)
  np.testing.assert_allclose(found, [0, 1, 1, 2], atol=1e-6)
  found = reward.dead_zone_penalty(gap, (1.0, 1.0, 1.0), 0.0)
  np.testing.assert_allclose(found[1], 0.0144, rtol=1e-5)


def test_penalty_has_a_gradient_beyond_the_zone_only():
  gap = jnp.asarray([0.01, -0.05, 0.05])
  gradient = jax.grad(reward.dead_zone_penalty)(gap)
  np.testing.assert_allclose(gradient, [0, -6, 12], rtol=1e-5)
