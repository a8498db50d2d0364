import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.sol import credit, reward


def reference(rewards, controls, gamma, ridge):
  """The formula, one group and one pair of steps at a time, in float64."""
  rewards, controls = np.float64(rewards), np.float64(controls)
  groups, size, horizon, axes = controls.shape
  out = np.zeros_like(rewards)
  for b in range(groups):
    left = np.zeros((size, horizon))
    for s in range(horizon):
      x = controls[b, :, s] - controls[b, :, s].mean(0)
      y = rewards[b, :, s] - rewards[b, :, s].mean()
      gram = x.T @ x
      penalty = ridge * np.trace(gram) / axes + 1e-9
      slope = np.linalg.solve(gram + penalty * np.eye(axes), x.T @ y)
      left[:, s] = y - x @ slope
    for t in range(horizon):
      out[b, :, t] = rewards[b, :, t]
      for s in range(t + 1, horizon):
        out[b, :, t] += gamma ** (s - t) * left[:, s]
  return out


def draw(*shape, seed=0):
  generator = np.random.default_rng(seed)
  return jnp.asarray(generator.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("gamma", [0.0, 0.85, 1.0])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_it_is_the_formula(gamma, ridge):
  rewards, controls = draw(2, 6, 5), draw(2, 6, 5, 3, seed=1)
  found = credit.residual_to_go(rewards, controls, gamma, ridge=ridge)
  expected = reference(rewards, controls, gamma, ridge)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_without_discounted_future_it_is_the_own_reward():
  rewards = draw(2, 6, 5)
  found = credit.residual_to_go(rewards, draw(2, 6, 5, 3), 0.0)
  np.testing.assert_array_equal(found, rewards)


def test_where_controls_do_not_vary_it_is_the_plain_return_centred():
  rewards = draw(2, 6, 5)
  found = credit.residual_to_go(rewards, jnp.ones((2, 6, 5, 3)), 0.85)
  plain = reward.returns_to_go(rewards, 0.85)
  centre = lambda x: x - np.mean(x, axis=1, keepdims=True)
  np.testing.assert_allclose(centre(found), centre(plain), atol=1e-5)


@pytest.mark.parametrize("gamma", [0.85, 1.0])
def test_same_credit_in_the_mean_with_less_variance(gamma):
  """Steps earn from their own action and from all that went before."""
  groups, size, horizon = 400, 64, 6
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (groups, size, horizon)
  actions = jax.random.bernoulli(keys[0], 0.5, shape).astype(jnp.float32)
  own = 1.0 + jax.random.uniform(keys[1], (1, 1, horizon))
  late = 0.3 * jnp.tril(jnp.ones((horizon, horizon)), -1)
  rewards = own * actions + jnp.einsum("bks,ts->bkt", actions, late)
  rewards = rewards + 0.1 * jax.random.normal(keys[2], shape)

  # What one step's action adds to its own and to later rewards.
  later = np.arange(horizon)[:, None] - np.arange(horizon)[None]
  weights = np.where(later > 0, gamma ** np.maximum(later, 0), 0)
  expected = np.asarray(own)[0, 0] + (weights * np.asarray(late)).sum(0)

  def slopes(returns):
    """Estimates (B, T) of the gain: high less low actions, in each group."""
    centred = returns - jnp.mean(returns, axis=1, keepdims=True)
    x = actions - jnp.mean(actions, axis=1, keepdims=True)
    return np.asarray(jnp.sum(centred * x, 1) / jnp.sum(x * x, 1), np.float64)

  plain = slopes(reward.returns_to_go(rewards, gamma))
  found = slopes(credit.residual_to_go(rewards, actions[..., None], gamma))
  for estimate in (plain, found):
    error = estimate.std(0) / np.sqrt(groups)
    # A fit of one slope in 64 rollouts takes 1/63 of later effects away.
    bias = (weights * np.asarray(late)).sum(0) / (size - 1)
    assert (np.abs(estimate.mean(0) - expected) < 5 * error + bias).all()
  assert (found.var(0)[:-1] < plain.var(0)[:-1]).all()
  assert found.var(0).sum() < 0.4 * plain.var(0).sum()
  # The last step has no later actions to be rid of.
  np.testing.assert_allclose(found[:, -1], plain[:, -1], rtol=1e-4)
