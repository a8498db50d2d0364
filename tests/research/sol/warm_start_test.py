import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import state as state_lib
from research.sol import cost, learn, policy, random_schedules, warm_start
from research.sol.observation import SCALARS, Observation
from research.sol.policy import InputStats
from research.sol.rollout import Rollout
from tests.research.sol import toy

WINDOWS = 8


@pytest.fixture(scope="module")
def method():
  return toy.method("frugal", standardise=False)


@pytest.fixture
def plant(monkeypatch):
  """Actions do their mean damage, or three times that at a surprise."""

  def score_block(setup, lm, prefix, tokens, starts, played, *, record, dense):
    assert record and dense is not None
    shape = played.shape
    key = jax.random.fold_in(jax.random.key(5), tokens[0, 0])
    surprise = jnp.sign(jax.random.normal(key, shape))
    damage = jnp.sum(toy.damage(setup.table), axis=1)[played]
    zeros = jnp.zeros(shape)
    seen = Observation(
      hidden=jnp.zeros((*shape, toy.CONFIG.d_model)),
      embed=None,
      scalars=jnp.stack([surprise] + [zeros] * (len(SCALARS) - 1), -1),
      drift=zeros,
      previous=jnp.zeros(shape, jnp.int32),
      spent=jnp.zeros((*shape, 3)),
      step=jnp.zeros(shape, jnp.int32),
    )
    return Rollout(
      actions=played,
      log_p=zeros,
      observations=seen,
      extras=None,
      divergence=damage * (2 + surprise),
    )

  monkeypatch.setattr(warm_start.rollout_lib, "score_block", score_block)


def frozen_of(method):
  damage = toy.damage(method.setup.table)
  return learn.Frozen(
    lm=toy.lm(),
    log_price=jnp.log(jnp.asarray([1.0, 4.0])),
    stats=InputStats.identity(toy.CONFIG.d_model, damage),
  )


def windows_of(method):
  return lambda number: np.asarray(
    toy.windows(WINDOWS, seed=number, layout=method.layout)
  )


def samples_of(method, folder, rounds=3, **options):
  frozen = frozen_of(method)
  lm, damage, log_price = frozen.lm, frozen.stats.damage, frozen.log_price
  score = jax.jit(
    lambda tokens, key: warm_start.score(
      method, lm, damage, log_price, tokens, key
    )
  )
  return warm_start.collect(
    score, windows_of(method), rounds, 7, folder, "test", **options
  )


def first_state(method, tx):
  params = policy.init(method.policy, jax.random.key(0))
  return state_lib.create_state(params, tx, jax.random.key(1))


def test_training_finds_what_the_damage_depends_on(plant, method, tmp_path):
  samples = samples_of(method, tmp_path)
  tx = learn.optimizer(1e-2, 200, clip_norm=2.0, schedule="constant")
  step = jax.jit(warm_start.make_step(method, tx))
  state, frozen = first_state(method, tx), frozen_of(method)
  batch_at = warm_start.minibatches(samples, 16)
  rows = []
  for number in range(150):
    state, metrics = step(state, batch_at(number), frozen)
    rows.append(jax.tree.map(float, metrics))
  assert int(state.step) == 150
  assert np.mean([row["over_mean"] for row in rows[-20:]]) < -0.1
  assert rows[0]["over_mean"] == pytest.approx(0, abs=1e-5)
  seen = warm_start.observations(method, frozen.lm, samples)
  model = policy.bind(method.policy, state.params)
  found = model(seen, samples["price"][:, None, None], frozen.stats.damage)[1]
  at = samples["scalars"][..., 0] > 0
  many, few = (np.asarray(found)[:, 0][mask].mean() for mask in (at, ~at))
  assert 2 < many / few < 4


def test_samples_are_what_a_model_did(method, tmp_path):
  samples = samples_of(method, tmp_path, rounds=1)
  episodes = WINDOWS * method.layout.episodes
  shapes = {name: value.shape for name, value in samples.items()}
  own = (episodes, toy.HORIZON)
  assert shapes == {
    "tokens": own,
    "action": own,
    "previous": own,
    "hidden": (*own, toy.CONFIG.d_model),
    "scalars": (*own, len(SCALARS)),
    "spent": (*own, 3),
    "divergence": own,
    "price": own[:1],
  }
  text = windows_of(method)(0)
  read = text[:, toy.CONTEXT : toy.CONTEXT + 2 * toy.HORIZON]
  np.testing.assert_array_equal(samples["tokens"], read.reshape(own))
  assert (samples["price"] > 0.99).all() and (samples["price"] < 4.01).all()
  assert (samples["previous"][:, 0] == method.setup.table.size).all()
  np.testing.assert_array_equal(
    samples["previous"][:, 1:], samples["action"][:, :-1]
  )
  # Before the first action that is not the full one nothing has changed.
  full = method.setup.table.full_index
  untouched = np.cumprod(samples["action"] == full, axis=1).astype(bool)
  assert untouched.any() and not untouched.all()
  np.testing.assert_allclose(samples["divergence"][untouched], 0, atol=1e-4)
  assert samples["divergence"][~untouched].mean() > 0.01
  stats = jax.jit(functools.partial(warm_start.measure_stats, method))(
    toy.lm(), toy.damage(method.setup.table), samples
  )
  assert stats.hidden.shape == stats.embed.shape == (2, toy.CONFIG.d_model)
  # Surprise of a random model is about that of a uniform guess, or more.
  assert 0.5 * np.log(64) < float(stats.scalars[0, 0]) < 20
  assert (np.asarray(stats.scalars[1]) > 0).all()


def test_collecting_goes_on_where_it_was(plant, method, tmp_path):
  """What was scored is read again, and half a file is not taken for one."""
  told = []
  whole = samples_of(method, tmp_path, progress=told.append)
  assert told == [WINDOWS * 2] * 3
  (tmp_path / "00001.npz").unlink()
  (tmp_path / "00001.tmp.npz").write_bytes(b"half")
  kept = (tmp_path / "00002.npz").stat().st_mtime_ns
  again = samples_of(method, tmp_path)
  assert (tmp_path / "00002.npz").stat().st_mtime_ns == kept
  for name, value in whole.items():
    np.testing.assert_array_equal(again[name], value)
  # Rounds differ, in text and in schedules.
  assert np.any(whole["tokens"][:16] != whole["tokens"][16:32])
  assert np.any(whole["action"][:16] != whole["action"][16:32])


@pytest.mark.parametrize("size, steps", [(4, 5), (6, 3), (64, 1)])
def test_every_episode_comes_once_an_epoch(size, steps):
  samples = {"price": np.arange(20.0), "action": np.arange(20)[:, None]}
  assert warm_start.steps_of(samples, size, epochs=3) == 3 * steps
  batch_at = warm_start.minibatches(samples, size)
  epochs = []
  for epoch in range(2):
    taken = [batch_at(epoch * steps + i) for i in range(steps)]
    price = np.concatenate([batch["price"] for batch in taken])
    assert len(set(price)) == len(price) == steps * min(size, 20)
    action = np.concatenate([batch["action"] for batch in taken])
    np.testing.assert_array_equal(action[:, 0], price)
    epochs.append(price)
  assert np.any(epochs[0] != epochs[1])
  np.testing.assert_array_equal(
    batch_at(0)["price"], epochs[0][: min(size, 20)]
  )


def test_schedules_follow_the_price():
  costs = np.linspace(0.2, 1.0, 5).astype(np.float32)
  gains = jnp.asarray([0.0, 0.5, 0.8, 0.95, 1.0])
  price = jnp.ones((40, 10)).at[:20].set(0.1)
  found = np.asarray(
    random_schedules.draw(costs, gains, price, 20, jax.random.key(0))
  )
  assert found.shape == (40, 10, 20) and found.dtype == np.int32
  for rows, price in ((found[:20], 0.1), (found[20:], 1.0)):
    value = np.asarray(gains) / price - costs
    chance = np.exp((value - value.max()) / random_schedules.TEMPERATURE)
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
  found = np.asarray(random_schedules.gain_scale(costs, gains, price))[0]
  many = jnp.repeat(price, 3000, axis=0)
  tried = random_schedules.draw(costs, gains, many, 4, jax.random.key(0))
  expected = np.asarray(gains)[np.asarray(tried)].std((0, 2))
  # A price that leaves no choice has a floor, the others hardly feel it.
  np.testing.assert_allclose(found[1:], expected[1:], rtol=0.05)
  assert expected[0] < found[0] < found[1]


def test_dear_actions_are_the_costly_ones(method):
  table = method.setup.table
  np.testing.assert_allclose(method.policy.costs, cost.net_keep(table))
