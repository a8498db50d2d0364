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


@pytest.fixture(scope="module", params=["label", "divergence"])
def method(request):
  return toy.method(
    "frugal",
    standardise=False,
    warm_learning_rate=1e-2,
    reward=request.param,
  )


@pytest.fixture
def plant(monkeypatch, method):
  """Actions do their mean damage, or three times that at a surprise."""

  def score_block(setup, lm, prefix, tokens, starts, played, *, record, dense):
    assert record
    shape = played.shape
    key = jax.random.fold_in(jax.random.key(5), tokens[0, 0])
    # All rollouts of an episode read the same text.
    surprise = jax.random.normal(key, (shape[0], 1, shape[2]))
    surprise = jnp.broadcast_to(jnp.sign(surprise), shape)
    gains = -jnp.sum(toy.damage(setup.table), axis=1)[played]
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
      log_p=gains * (2 + surprise),
      observations=seen,
      extras=None,
      divergence=None if dense is None else -gains * (2 + surprise),
    )

  monkeypatch.setattr(warm_start.rollout_lib, "score_block", score_block)


def batch_at(method, step):
  tokens = toy.windows(WINDOWS, seed=step, layout=method.layout)
  return {"tokens": tokens, "ids": np.arange(WINDOWS, dtype=np.int32)}


def frozen_of(method):
  damage = toy.damage(method.setup.table)
  return {
    "lm": toy.lm(),
    "damage": damage,
    "stats": InputStats.identity(toy.CONFIG.d_model, damage),
    "log_price": jnp.log(jnp.asarray([1.0, 4.0])),
    "prefixes": None,
  }


def test_training_finds_what_the_gains_depend_on(plant, method):
  tx = learn.optimizer(1e-2, 200, clip_norm=2.0, schedule="constant")
  step = jax.jit(warm_start.make_step(method, tx))
  params = policy.init(method.policy, jax.random.key(0))
  state = state_lib.create_state(params, tx, jax.random.key(1))
  rows = []
  for number in range(120):
    state, metrics = step(
      state, batch_at(method, number % 5), frozen_of(method)
    )
    rows.append(jax.tree.map(float, metrics))
  mean = lambda name, part: np.mean([row[name] for row in rows[part]])
  first, last = rows[0]["loss"], mean("loss", slice(-20, None))
  # A deviance has no zero.
  assert last < (0.3 * first if method.reward == "label" else first - 0.05)
  assert mean("correlation", slice(-20, None)) > 0.95
  assert int(state.step) == 120


def test_an_update_on_a_model(method):
  tx = learn.optimizer(1e-3, 10, clip_norm=2.0, schedule="constant")
  params = policy.init(method.policy, jax.random.key(0))
  state = state_lib.create_state(params, tx, jax.random.key(1))
  frozen = frozen_of(method)
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
  np.testing.assert_array_equal(stats.damage, frozen["damage"])


@pytest.mark.parametrize("how", ["return", "residual"])
def test_gains_are_centred_returns(how):
  method = toy.method("frugal", credit=how)
  shape = (WINDOWS, 8, toy.HORIZON)
  generator = np.random.default_rng(0)
  played = jnp.asarray(generator.integers(0, 8, shape), jnp.int32)
  log_p = jnp.asarray(generator.normal(size=shape), jnp.float32)
  rollout = Rollout(actions=played, log_p=log_p, observations=None, extras=None)
  found = warm_start.centred_gain(method, rollout)
  assert found.shape == (WINDOWS * 2, 4, toy.HORIZON)
  np.testing.assert_allclose(found.mean(1), 0, atol=1e-5)
  plain = reward.returns_to_go(log_p, method.gamma).reshape(found.shape)
  plain = plain - plain.mean(1, keepdims=True)
  same = np.allclose(found, plain, atol=1e-5)
  assert same == (how == "return")


def test_behaviour_follows_the_price():
  costs = np.linspace(0.2, 1.0, 5).astype(np.float32)
  gains = jnp.asarray([0.0, 0.5, 0.8, 0.95, 1.0])
  price = jnp.ones((40, 10)).at[:20].set(0.1)
  found = np.asarray(behaviour.draw(costs, gains, price, 20, jax.random.key(0)))
  assert found.shape == (40, 10, 20) and found.dtype == np.int32
  for rows, price in ((found[:20], 0.1), (found[20:], 1.0)):
    value = np.asarray(gains) / price - costs
    chance = np.exp((value - value.max()) / behaviour.TEMPERATURE)
    share = np.bincount(rows.ravel(), minlength=5) / rows.size
    np.testing.assert_allclose(share, chance / chance.sum(), atol=0.04)
  assert costs[found[:20]].mean() > costs[found[20:]].mean()
  # Steps of a group are drawn apart, so that none stands for its neighbour.
  steps = costs[found[20:]].reshape(-1, 20)
  assert abs(np.corrcoef(steps[:, 3], steps[:, 4])[0, 1]) < 0.3


def test_the_scale_of_a_price_is_the_spread_of_what_it_tries():
  costs = np.linspace(0.2, 1.0, 5).astype(np.float32)
  gains = jnp.asarray([0.0, 0.5, 0.8, 0.95, 1.0])
  price = jnp.asarray([[0.1, 1.0, 3.0]])
  found = np.asarray(behaviour.gain_scale(costs, gains, price))[0]
  many = jnp.repeat(price, 3000, axis=0)
  tried = behaviour.draw(costs, gains, many, 4, jax.random.key(0))
  expected = np.asarray(gains)[np.asarray(tried)].std((0, 2))
  # A price that leaves no choice has a floor, the others hardly feel it.
  np.testing.assert_allclose(found[1:], expected[1:], rtol=0.05)
  assert expected[0] < found[0] < found[1]


def test_dear_actions_are_the_costly_ones(method):
  table = method.setup.table
  np.testing.assert_allclose(method.policy.costs, cost.net_keep(table))
