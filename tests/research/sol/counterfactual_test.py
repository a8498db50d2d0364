import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.sol import actions, cost, counterfactual
from research.sol.observation import SCALARS, Observation
from research.sol.rollout import Rollout

TABLE = actions.preset("J-2L")
HORIZON = 4
# By hand: no arrays of jax while tests are collected.
DAMAGE = np.float32(
  [
    [0.5 * (k < 1), 2.0 * (r < 1), 1.0 * (b < 16)]
    for k, r, b in zip(TABLE.kappa, TABLE.rho, TABLE.bits)
  ]
)
STATS = np.stack(
  [np.linspace(-1, 1, len(SCALARS)), np.linspace(0.5, 2, len(SCALARS))]
).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class NoModel:
  """Stands where a set-up does; the rollouts are planted."""

  table: actions.ActionTable
  horizon: int
  noise: float

  def build_prefix(self, params, tokens, first_start):
    assert tokens.shape[1] == first_start + 4
    return None


def planted():
  """Log-sensitivities (10, 3), on standardised scalars and a constant."""
  return np.random.default_rng(0).normal(size=(10, 3)) * 0.2


def standardised(scalars):
  x = (np.asarray(scalars) - STATS[0]) / STATS[1]
  return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)


def gains_of(scalars, coefficients):
  """(..., A) in nats."""
  raw = standardised(scalars) @ coefficients
  return -np.exp(3 * np.tanh(raw / 3)) @ np.float64(DAMAGE).T


@pytest.fixture
def plant(monkeypatch):
  """Steps earn their planted gain, a text's own likelihood, and noise."""

  def score_block(setup, params, prefix, tokens, starts, played, *, record):
    assert record
    shape = (played.shape[0], 1, HORIZON, len(SCALARS))
    key = jax.random.fold_in(jax.random.key(7), tokens[0, 0])
    scalar_key, own_key, noise_key = jax.random.split(key, 3)
    scalars = STATS[0][None, None, None] + STATS[1][
      None, None, None
    ] * jax.random.normal(scalar_key, shape)
    scalars = jnp.broadcast_to(scalars, (*played.shape, len(SCALARS)))
    x = (scalars - STATS[0][None, None, None]) / STATS[1][None, None, None]
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    raw = jnp.matmul(
      x, jnp.asarray(planted(), jnp.float32), precision="highest"
    )
    sensitive = jnp.exp(3 * jnp.tanh(raw / 3))
    gain = -jnp.sum(sensitive * jnp.asarray(DAMAGE)[played], axis=-1)
    own = jax.random.normal(own_key, (played.shape[0], 1, HORIZON))
    noise = setup.noise * jax.random.normal(noise_key, played.shape)
    empty = jnp.zeros(played.shape)
    seen = Observation(
      hidden=empty,
      embed=None,
      scalars=scalars,
      drift=empty,
      previous=empty,
      spent=empty,
      step=empty,
    )
    return Rollout(
      actions=played,
      log_p=gain + own + noise,
      observations=seen,
      extras=None,
    )

  monkeypatch.setattr(counterfactual.rollout_lib, "score_block", score_block)


def fit(noise, batches, **options):
  windows = [np.full((4, 2 + HORIZON + HORIZON), i) for i in range(batches)]
  return counterfactual.fit_labels(
    NoModel(TABLE, HORIZON, noise),
    None,
    windows,
    np.array([2, 2]),
    damage=jnp.asarray(DAMAGE),
    log_price=jnp.log(jnp.array([5.0, 20.0])),
    scalar_stats=jnp.asarray(STATS),
    schedules=16,
    **options,
  )


def relative_error(coefficients):
  scalars = STATS[0] + STATS[1] * np.random.default_rng(5).normal(
    size=(500, len(SCALARS))
  )
  expected = gains_of(scalars, planted())
  found = gains_of(scalars, coefficients)
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_planted_gains_are_found(plant):
  found = fit(0.0, 4, gamma=0.0, ridges=(1e-9,))
  assert found.shape == (10, 3)
  assert found.dtype == np.float32
  assert relative_error(found) < 1e-3


def test_planted_gains_are_found_in_noise_and_later_rewards(plant):
  few, many = (fit(1.0, n, gamma=1.0) for n in (2, 16))
  assert relative_error(many) < 0.15
  assert relative_error(many) < relative_error(few)


def samples_of(episodes):
  """Planted damage under noise that multiplies, with mean one."""
  generator = np.random.default_rng(4)
  shape = (episodes, HORIZON)
  scalars = STATS[0] + STATS[1] * generator.normal(size=(*shape, len(SCALARS)))
  played = generator.integers(0, TABLE.size, shape)
  expected = -np.take_along_axis(
    gains_of(scalars, planted()), played[..., None], axis=-1
  )
  return {
    "scalars": scalars.astype(np.float32),
    "action": played,
    "divergence": expected[..., 0] * generator.exponential(size=shape),
    "price": np.full(episodes, 10.0, np.float32),
  }


def test_planted_damage_is_found_in_divergences(monkeypatch):
  # The planted tokens inherit nothing.
  monkeypatch.setattr(counterfactual.damage_lib, "_INHERITED", 0.0)
  few, many = (
    counterfactual.fit_samples(
      samples_of(episodes),
      costs=cost.net_keep(TABLE),
      damage=jnp.asarray(DAMAGE),
      scalar_stats=jnp.asarray(STATS),
      ridges=(1e-6,),
    )
    for episodes in (60, 4000)
  )
  assert many.shape == (10, 3) and many.dtype == np.float32
  assert relative_error(many) < 0.1
  assert relative_error(many) < relative_error(few)


def test_noise_alone_is_shrunk_towards_the_mean_damage(plant):
  """The penalty is chosen on batches that were held out."""
  found = fit(30.0, 4, gamma=0.0, ridges=(1e-9, 1000.0))
  strict = fit(30.0, 4, gamma=0.0, ridges=(1000.0,))
  loose = fit(30.0, 4, gamma=0.0, ridges=(1e-9,))
  np.testing.assert_array_equal(found, strict)
  assert np.linalg.norm(strict) < np.linalg.norm(loose)
  np.testing.assert_allclose(strict, 0, atol=0.05)


def test_the_fit_is_a_function_of_its_seed(plant):
  one, again, other = (fit(1.0, 2, gamma=0.0, seed=s) for s in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert np.any(one != other)


def test_the_controller_takes_the_largest_gain_less_price():
  charged = tuple(cost.net_keep(TABLE).tolist())
  controller = counterfactual.controller(charged)
  assert controller is counterfactual.controller(charged)
  coefficients = 3 * planted().astype(np.float32)
  generator = np.random.default_rng(3)
  scalars = generator.normal(size=(3, 4, len(SCALARS))).astype(np.float32)
  empty = jnp.zeros((3, 4))
  seen = Observation(
    hidden=empty,
    embed=empty,
    scalars=jnp.asarray(scalars),
    drift=empty,
    previous=empty,
    spent=empty,
    step=empty,
  )
  price = jnp.asarray(generator.uniform(0, 9, (3, 4, 1)), jnp.float32)
  params = (coefficients, jnp.asarray(STATS), jnp.asarray(DAMAGE))
  carry = controller.start(params, price)
  found, _, _ = controller.act(params, price, carry, seen, jax.random.key(0))
  value = gains_of(scalars, coefficients)
  # Later tokens suffer alike.
  value = value - 0.25 * np.float64(DAMAGE).sum(1)
  value = value - np.asarray(price) * cost.net_keep(TABLE)
  np.testing.assert_array_equal(found, value.argmax(-1))
  assert found.dtype == jnp.int32 and len(np.unique(found)) > 1
  cheap, _, _ = controller.act(params, 1e4 + price, carry, seen, None)
  assert (cheap == cost.net_keep(TABLE).argmin()).all()
  free, _, _ = controller.act(params, 0 * price, carry, seen, None)
  assert (free == TABLE.full_index).all()
