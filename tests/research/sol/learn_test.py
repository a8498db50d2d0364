import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.sol import (
  credit,
  grpo,
  learn,
  policy,
  random_schedules,
  reward,
  rollout,
)
from research.sol.damage import mean_gains
from research.sol.policy import InputStats
from research.sol.rollout import Rollout
from tests.research.sol import toy

WINDOWS = 8
LOG_PRICE = np.log([0.5, 5.0]).astype(np.float32)


def batch_at(method, step):
  tokens = toy.windows(WINDOWS, seed=step, layout=method.layout)
  return {
    "tokens": np.asarray(tokens),
    "ids": np.arange(WINDOWS, dtype=np.int32),
  }


def frozen_of(method):
  damage = toy.damage(method.setup.table)
  return learn.Frozen(
    lm=toy.lm(),
    log_price=jnp.asarray(LOG_PRICE),
    stats=InputStats.identity(toy.CONFIG.d_model, damage),
    reference=policy.init(method.policy, jax.random.key(7)),
  )


def first_state(method, tx):
  params = policy.init(method.policy, jax.random.key(0))
  return state_lib.create_state(params, tx, jax.random.key(1))


def train(method, rate=1e-3, updates=1, shape=None):
  """Metrics of every update, and the last state."""
  tx = learn.optimizer(rate, 100, clip_norm=2.0, schedule="constant")
  step = state_lib.jit_step(
    learn.make_step(method, tx), mesh_lib.make(shape or {"data": 1})
  )
  state, rows = first_state(method, tx), []
  for number in range(updates):
    state, metrics = step(state, batch_at(method, number), frozen_of(method))
    rows.append(jax.tree.map(float, metrics))
  return rows, state


@pytest.fixture(scope="module")
def published():
  """Three updates in published mode on one device, one epoch each."""
  return train(toy.method("published", kl_coef=0.5), updates=3)


def test_an_update_of_the_published_mode(published):
  (row, *_), state = published
  assert int(state.step) == 3
  assert all(np.isfinite(list(row.values())))
  assert {"loss", "log_p", "penalty", "entropy", "gap_kappa"} <= row.keys()
  assert "cost" not in row
  before = first_state(toy.method("published"), optax.sgd(1.0)).params
  moved = [
    bool(np.any(np.asarray(a) != np.asarray(b)))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params))
  ]
  assert all(moved)
  # New actions are drawn nearly uniformly from 8.
  assert 0.8 * np.log(8) < row["entropy"] <= np.log(8) + 1e-6


def test_in_the_first_epoch_the_ratio_is_one(published):
  """The rollout's step-by-step probabilities are those that are trained."""
  for row in published[0]:
    np.testing.assert_allclose(
      [row["ratio_min"], row["ratio_mean"], row["ratio_max"]], 1.0, atol=1e-4
    )
    assert row["clip_share"] == 0 and abs(row["kl"]) < 1e-6


def test_the_loss_has_the_entropy_and_the_divergence_with_their_signs(
  published,
):
  """At a ratio of one whitened advantages add up to nothing."""
  entropy_coef = toy.method("published").entropy_coef
  for row in published[0]:
    assert row["kl_reference"] > 1e-3 and entropy_coef * row["entropy"] > 0.05
    expected = 0.5 * row["kl_reference"] - entropy_coef * row["entropy"]
    assert row["loss"] == pytest.approx(expected, abs=1e-4)


def test_eight_devices_learn_what_one_does(published):
  method = toy.method("published", kl_coef=0.5)
  # The frozen model is cut, and so are the windows.
  shape = {"data": 2, "fsdp": 2, "tensor": 2}
  rows, _ = train(method, updates=3, shape=shape)
  for one, eight in zip(published[0], rows, strict=True):
    assert one.keys() == eight.keys()
    for name in one:
      np.testing.assert_allclose(
        eight[name], one[name], rtol=1e-3, atol=1e-5, err_msg=name
      )


def test_further_epochs_move_the_ratio():
  """In frugal mode, which pays a price."""
  method = toy.method("frugal", inner_epochs=3)
  (row,), state = train(method, rate=1e-2)
  assert all(np.isfinite(list(row.values())))
  assert {"cost", "spent_rho"} <= row.keys() and "penalty" not in row
  assert row["ratio_max"] > 1.05 and row["ratio_min"] < 0.95
  assert row["kl"] > 1e-4
  assert int(state.step) == 1


def random_rollout(method, seed=0):
  generator = np.random.default_rng(seed)
  shape = (
    WINDOWS,
    method.layout.episodes * method.group_size,
    method.layout.horizon,
  )
  played = generator.integers(0, method.setup.table.size, shape)
  return Rollout(
    actions=jnp.asarray(played, jnp.int32),
    log_p=jnp.asarray(-generator.exponential(size=shape), jnp.float32),
    observations=None,
    extras=None,
  )


def test_advantages_with_prices():
  method = toy.method("frugal", whiten=False, gamma=0.85)
  played = random_rollout(method)
  goal = learn.draw_goals(
    method, jnp.asarray(LOG_PRICE), WINDOWS, jax.random.key(0)
  )
  damage = toy.damage(method.setup.table)
  found, _, metrics = learn.advantages_of(method, played, goal, damage)
  costs = np.asarray(method.policy.costs)[np.asarray(played.actions)]
  rewards = np.asarray(played.log_p) - np.asarray(goal) * costs
  # The share of later damage that the discount hides.
  later = 0.15 * 0.25 * np.asarray(damage).sum(1)
  rewards = rewards - later[np.asarray(played.actions)]
  group = lambda x: jnp.asarray(x).reshape(-1, 4, *x.shape[2:])
  spent = rollout.action_costs(method.setup.table)[played.actions]
  returns = credit.residual_to_go(group(rewards), group(spent), 0.85)
  # Prices are compared in units of what they move.
  scale = random_schedules.gain_scale(
    method.policy.costs, mean_gains(damage), goal[..., 0]
  )
  returns = returns / group(scale)[..., None]
  np.testing.assert_allclose(
    found, grpo.advantages(returns, whiten=False), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(metrics["cost"], costs.mean(), rtol=1e-5)
  np.testing.assert_allclose(
    metrics["spent_kappa"], np.asarray(spent)[..., 0].mean(), rtol=1e-5
  )


def test_advantages_with_targets():
  method = toy.method("published", whiten=False)
  played = random_rollout(method)
  goal = learn.draw_goals(
    method, jnp.asarray(LOG_PRICE), WINDOWS, jax.random.key(0)
  )
  damage = toy.damage(method.setup.table)
  found, _, metrics = learn.advantages_of(method, played, goal, damage)
  spent = rollout.action_costs(method.setup.table)[played.actions]
  gap = np.asarray(spent).mean(2) - np.asarray(goal)
  penalty = reward.dead_zone_penalty(jnp.asarray(gap))
  returns = reward.returns_to_go(played.log_p, 0.85) - penalty[..., None]
  returns = returns.reshape(-1, 4, method.layout.horizon)
  np.testing.assert_allclose(
    found, grpo.advantages(returns, whiten=False), rtol=1e-4, atol=1e-3
  )
  np.testing.assert_allclose(metrics["penalty"], penalty.mean(), rtol=1e-5)


@pytest.mark.parametrize("mode", ["frugal", "published"])
def test_gdpo_normalises_reward_and_budget_apart(mode):
  """So that neither's scale matters; together they are the usual return."""
  method = toy.method(mode, whiten=False, normalise="gdpo")
  played = random_rollout(method)
  goal = learn.draw_goals(
    method, jnp.asarray(LOG_PRICE), WINDOWS, jax.random.key(0)
  )
  damage = toy.damage(method.setup.table)
  found, _, _ = learn.advantages_of(method, played, goal, damage)
  louder = dataclasses.replace(played, log_p=1000 * played.log_p)
  again, _, _ = learn.advantages_of(method, louder, goal, 1000 * damage)
  plain = dataclasses.replace(method, normalise="zscore")
  one, _, _ = learn.advantages_of(plain, played, goal, damage)
  other, _, _ = learn.advantages_of(plain, louder, goal, 1000 * damage)
  assert np.isfinite(found).all() and np.abs(found).max() < 4
  np.testing.assert_allclose(again, found, atol=2e-2)
  assert np.abs(other - one).max() > 0.5


@pytest.mark.parametrize("mode", ["frugal", "published"])
def test_goals_are_shared_by_a_group_and_stay_in_range(mode):
  method = toy.method(mode)
  goal = np.asarray(
    learn.draw_goals(method, jnp.asarray(LOG_PRICE), 50, jax.random.key(3))
  )
  size = 1 if mode == "frugal" else 3
  groups = goal.reshape(50, 2, 4, size)
  np.testing.assert_array_equal(groups, np.repeat(groups[:, :, :1], 4, 2))
  assert len(np.unique(groups[:, :, 0, 0])) == 100
  if mode == "frugal":
    assert 0.5 <= goal.min() < 0.7 and 4 < goal.max() <= 5
  else:
    low = np.array(method.target_low)
    assert (goal >= low - 1e-6).all() and (goal <= 1).all()
    assert (goal.min((0, 1)) < low + 0.05).all()
    assert (goal.max((0, 1)) > 0.95).all()


def test_starts_stand_side_by_side():
  method = toy.method("frugal")
  np.testing.assert_array_equal(
    learn.starts_of(method, 2), np.repeat([[16, 24]] * 2, 4, axis=1)
  )
  values = learn.starts_of(method, 2)
  np.testing.assert_array_equal(
    learn.grouped(method, values), [[16] * 4, [24] * 4] * 2
  )


def test_a_cached_prefix_is_the_computed_one():
  method = toy.method("frugal")
  pool = toy.windows(6, layout=method.layout)
  frozen = frozen_of(method)
  build = jax.jit(functools.partial(learn.prefix_of, method, frozen))
  everything = build({"tokens": pool})
  ids = np.array([4, 0, 5])
  cached = learn.prefix_of(
    method,
    dataclasses.replace(frozen, prefixes=everything),
    {"tokens": pool[ids], "ids": ids},
  )
  fresh = build({"tokens": pool[ids]})
  assert vars(cached).keys() == vars(fresh).keys()
  for name, value in vars(fresh).items():
    np.testing.assert_allclose(
      getattr(cached, name), value, rtol=1e-4, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_follows_its_schedule(schedule):
  tx = learn.optimizer(1e-2, 100, clip_norm=1.0, schedule=schedule)
  params = jnp.zeros(3)
  state, sizes = tx.init(params), []
  for _ in range(100):
    updates, state = tx.update(jnp.full(3, 1e3), state, params)
    sizes.append(float(-updates[0]))
  if schedule == "constant":
    np.testing.assert_allclose(sizes, 1e-2, rtol=1e-3)
  else:
    assert max(sizes) == pytest.approx(1e-2, rel=1e-2)
    assert sizes[0] == pytest.approx(1e-3, rel=1e-2)
    assert sizes[-1] == pytest.approx(1e-3, rel=0.1)
