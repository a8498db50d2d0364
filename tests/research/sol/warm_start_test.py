import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import state as state_lib
from research.sol import behaviour, cost, learn, policy, reward, warm_start
from research.sol.observation import SCALARS, Observation
from research.sol.policy import InputStats
from research.sol.rollout import Rollout
from tests.research.sol import toy

WINDOWS = 8


@pytest.fixture(scope="module")
def method():
  return toy.method("frugal", standardise=False, warm_learning_rate=1e-2)


@pytest.fixture(scope="module")
def weights(method):
  """Planted mean gains, in the basis of the action table."""
  size = method.setup.table.basis().shape[1]
  return np.random.default_rng(0).normal(size=size).astype(np.float32)


@pytest.fixture
def plant(monkeypatch, method, weights):
  """Steps earn what their action is worth, doubled where surprise is high."""

  def score_block(setup, lm, prefix, tokens, starts, played, *, record):
    assert record
    shape = played.shape
    key = jax.random.fold_in(jax.random.key(5), tokens[0, 0])
    # All rollouts of an episode read the same text.
    surprise = jax.random.normal(key, (shape[0], 1, shape[2]))
    surprise = jnp.broadcast_to(jnp.sign(surprise), shape)
    gains = jnp.asarray(setup.table.basis() @ weights)[played]
    zeros = jnp.zeros(shape)
    seen = Observation(
      hidden=jnp.zeros((*shape, toy.CONFIG.d_model)),
      embed=None,
      scalars=jnp.stack([surprise] + [zeros] * (len(SCALARS) - 1), -1),
      drift=zeros,
      previous=jnp.zeros(shape, jnp.int32),
      spent=jnp.zeros((*shape, 3)),
      step=jnp.broadcast_to(
        jnp.arange(shape[2], dtype=jnp.int32)[None, None], shape
      ),
    )
    return Rollout(
      actions=played,
      log_p=gains * (1.5 + 0.5 * surprise),
      observations=seen,
      extras=None,
    )

  monkeypatch.setattr(warm_start.rollout_lib, "score_block", score_block)


def batch_at(method, step):
  tokens = toy.windows(WINDOWS, seed=step, layout=method.layout)
  return {"tokens": tokens, "ids": np.arange(WINDOWS, dtype=np.int32)}


def frozen_of():
  return {
    "lm": toy.lm(),
    "stats": InputStats.identity(toy.CONFIG.d_model),
    "log_price": jnp.log(jnp.asarray([0.5, 2.0])),
    "prefixes": None,
  }


def differences(gains):
  return gains - np.mean(gains, axis=-1, keepdims=True)


def test_mean_gains_are_found_up_to_a_constant(plant, method, weights):
  batches = [batch_at(method, step) for step in range(4)]
  found, gains = warm_start.mean_gains(
    method, frozen_of(), batches, jax.random.key(0)
  )
  assert gains.shape == (method.setup.table.size,) and gains.min() == 0
  expected = differences(1.5 * method.setup.table.basis() @ weights)
  error = np.linalg.norm(differences(gains) - expected)
  assert error < 0.1 * np.linalg.norm(expected)
  basis = method.setup.table.basis()
  np.testing.assert_allclose(
    differences(basis @ found), differences(gains), atol=1e-5
  )
  # A policy that starts there predicts them everywhere.
  params = policy.init(method.policy, jax.random.key(1))
  started = warm_start.with_mean_gain(params, found)
  np.testing.assert_array_equal(params["head"]["bias"], 0)
  goal = jnp.ones((WINDOWS, 8, 1))

  @jax.jit
  def predict(params, batch, frozen):
    rollout = warm_start.score_random(
      method, frozen, batch, goal, jax.random.key(0)
    )
    starts = learn.starts_of(method, WINDOWS)
    seen = learn.full_observations(
      method, frozen, batch["tokens"], starts, rollout
    )
    return policy.bind(method.policy, params)(seen, goal)[1]

  predicted = predict(started, batches[0], frozen_of())
  np.testing.assert_allclose(
    differences(np.asarray(predicted)),
    np.broadcast_to(differences(gains), predicted.shape),
    atol=1e-4,
  )


def test_training_finds_what_the_gains_depend_on(plant, method):
  tx = learn.optimizer(1e-2, 200, clip_norm=2.0, schedule="constant")
  step = jax.jit(warm_start.make_step(method, tx))
  params = policy.init(method.policy, jax.random.key(0))
  state = state_lib.create_state(params, tx, jax.random.key(1))
  rows = []
  for number in range(120):
    state, metrics = step(state, batch_at(method, number % 5), frozen_of())
    rows.append(jax.tree.map(float, metrics))
  mean = lambda name, part: np.mean([row[name] for row in rows[part]])
  assert mean("loss", slice(-20, None)) < 0.3 * mean("loss", slice(5))
  assert mean("correlation", slice(-20, None)) > 0.85
  assert int(state.step) == 120


def test_an_update_on_a_model(method):
  tx = learn.optimizer(1e-3, 10, clip_norm=2.0, schedule="constant")
  params = policy.init(method.policy, jax.random.key(0))
  state = state_lib.create_state(params, tx, jax.random.key(1))
  frozen = frozen_of() | {"gains": jnp.arange(8.0)}
  step = jax.jit(warm_start.make_step(method, tx))
  state, metrics = step(state, batch_at(method, 0), frozen)
  assert all(np.isfinite([float(x) for x in metrics.values()]))
  assert float(metrics["target_std"]) > 0
  assert np.any(np.asarray(state.params["head"]["kernel"]) != 0)
  stats = jax.jit(functools.partial(warm_start.measure_stats, method))(
    frozen, batch_at(method, 0), jax.random.key(0)
  )
  assert stats.hidden.shape == stats.embed.shape == (2, toy.CONFIG.d_model)
  # Surprise of a random model is about that of a uniform guess, or more.
  assert 0.5 * np.log(64) < float(stats.scalars[0, 0]) < 20
  assert (np.asarray(stats.scalars[1]) > 0).all()


def test_groups_weigh_by_inverse_variance():
  generator = np.random.default_rng(0)
  target = generator.normal(size=(3, 400, 2)) * np.array([[[0.1]], [[1]], [[9]]])
  found = warm_start.group_weights(jnp.asarray(target))
  assert found.shape == (3, 1, 2)
  expected = 1 / (target.var(1, keepdims=True) + 1e-3)
  np.testing.assert_allclose(found, expected, rtol=0.05)


@pytest.mark.parametrize("how", ["return", "residual"])
def test_gains_are_centred_returns(how):
  method = toy.method("frugal", credit=how)
  shape = (WINDOWS, 8, toy.HORIZON)
  generator = np.random.default_rng(0)
  played = jnp.asarray(generator.integers(0, 8, shape), jnp.int32)
  log_p = jnp.asarray(generator.normal(size=shape), jnp.float32)
  rollout = Rollout(
    actions=played, log_p=log_p, observations=None, extras=None
  )
  found = warm_start.centred_gain(method, rollout)
  assert found.shape == (WINDOWS * 2, 4, toy.HORIZON)
  np.testing.assert_allclose(found.mean(1), 0, atol=1e-5)
  plain = reward.returns_to_go(log_p, method.gamma).reshape(found.shape)
  plain = plain - plain.mean(1, keepdims=True)
  same = np.allclose(found, plain, atol=1e-5)
  assert same == (how == "return")


def test_behaviour_is_uniform_until_gains_are_known():
  costs = np.linspace(0.2, 1.0, 5).astype(np.float32)
  price = jnp.ones((40, 10))
  draw = lambda gains, price: np.asarray(
    behaviour.draw(costs, gains, price, 20, jax.random.key(0))
  )
  uniform = draw(None, price)
  assert uniform.shape == (40, 10, 20) and uniform.dtype == np.int32
  share = np.bincount(uniform.ravel(), minlength=5) / uniform.size
  np.testing.assert_allclose(share, 0.2, atol=0.03)
  # With gains, every step follows its price.
  gains = jnp.asarray([0.0, 0.5, 0.8, 0.95, 1.0])
  found = draw(gains, price.at[:20].set(0.1))
  chance = lambda price: np.asarray(
    jax.nn.softmax(
      (gains / price - jnp.asarray(costs)) / behaviour.TEMPERATURE
    )
  )
  for rows, price in ((found[:20], 0.1), (found[20:], 1.0)):
    share = np.bincount(rows.ravel(), minlength=5) / rows.size
    np.testing.assert_allclose(share, chance(price), atol=0.04)
  assert costs[found[:20]].mean() > costs[found[20:]].mean()


def test_dear_actions_are_the_costly_ones(method):
  table = method.setup.table
  np.testing.assert_allclose(method.policy.costs, cost.net_keep(table))
