import jax.numpy as jnp
import numpy as np
import pytest

from research.sol import actions, cost, damage
from research.sol import windows as windows_lib
from tests.research.sol import toy

TABLE = actions.preset("J-3L")


def left_out(table):
  kept = np.stack([table.kappa, table.rho, np.asarray(table.bits) / 16], -1)
  return (1 - kept) ** 2


def test_every_level_below_full_is_moved():
  assert damage.moves(TABLE) == [
    ("kappa", 0.1),
    ("kappa", 0.6),
    ("rho", 0.4),
    ("rho", 0.8),
    ("bits", 5.0),
    ("bits", 7.0),
  ]
  assert damage.moves(actions.preset("K10")) == [("kappa", 0.1)]


def test_a_hull_is_convex_and_below_the_points():
  generator = np.random.default_rng(0)
  x = np.sort(generator.uniform(size=30))
  y = (1 - x) ** 2 + 0.1 * generator.uniform(size=30)
  found = damage.convex(x, y)
  assert (found <= y + 1e-12).all()
  slopes = np.diff(found) / np.diff(x)
  assert (np.diff(slopes) >= -1e-9).all()
  np.testing.assert_allclose(found[[0, -1]], y[[0, -1]])
  np.testing.assert_allclose(damage.convex(x, x**2), x**2)
  np.testing.assert_array_equal(damage.convex(x[:1], y[:1]), y[:1])


def test_gains_are_damage_that_is_avoided():
  gains = damage.mean_gains(left_out(TABLE))
  assert gains.min() == 0 and gains.argmax() == TABLE.full_index
  np.testing.assert_allclose(
    gains.max() - gains, left_out(TABLE).sum(1), atol=1e-12
  )


def test_prices_span_what_is_worth_learning():
  total = left_out(TABLE).sum(1)
  costs = cost.net_keep(TABLE)
  low, high = np.exp(damage.log_prices(cost.net_keep(TABLE), left_out(TABLE)))
  assert low < high
  best = lambda price: np.argmin(total / price + costs)
  assert total[best(low)] < 0.01
  assert costs[best(high)] <= costs.min() + 0.03 * np.ptp(costs)
  # All static budgets switch at nearly one price: tokens must not.
  assert high / low >= 15.9


def test_prices_of_many_levels_are_not_wider_than_needed():
  table = actions.preset("S-FL")
  loss = np.zeros((table.size, 3))
  loss[:, 1] = np.exp(-12 * (np.array(table.rho) - 0.4)) - np.exp(-12 * 0.6)
  costs = cost.net_keep(table)
  low, high = np.exp(damage.log_prices(cost.net_keep(table), loss))
  best = lambda price: np.argmin(loss[:, 1] / price + costs)
  assert loss[best(low / 1.1), 1] < 0.01 <= loss[best(low * 1.1), 1]
  assert costs[best(high * 1.1)] <= costs.min() + 0.03 * np.ptp(costs)
  assert costs[best(high / 1.1)] > costs.min() + 0.03 * np.ptp(costs)


def test_levels_are_measured_alone():
  layout = windows_lib.Layout(context=16, horizon=8, episodes=2)
  text = windows_lib.whole(np.asarray(toy.windows(3, layout=layout)), layout)
  table = actions.preset("J-2L")
  found = damage.measure(toy.setup(table=table), toy.lm(), text, window_batch=2)
  assert found.shape == (8, 3) and found.dtype == np.float32
  assert (found >= 0).all()
  np.testing.assert_array_equal(found[table.full_index], 0)
  # An action's damage on an axis is that of its level there.
  for axis, name in enumerate(actions.AXES):
    for level in table.levels(name):
      same = np.asarray(getattr(table, name)) == level
      assert np.ptp(found[same, axis]) == 0
  assert found.max() > 1e-3
  # On a random model labels are noise, and the divergence is not.
  other = damage.measure(
    toy.setup(table=table), toy.lm(), text, window_batch=2, divergence=True
  )
  assert (other >= 0).all() and other.max() > 1e-3
  assert np.any(other != found)


def test_the_best_prediction_of_divergences_is_their_mean():
  """Whatever the noise: it multiplies, and spreads over orders of magnitude."""
  generator = np.random.default_rng(0)
  mean = generator.uniform(0.01, 2.0, (100, 400))
  noise = np.exp(1.5 * generator.normal(size=mean.shape) - 1.5**2 / 2)
  found = lambda factor: float(
    damage.divergence_loss(
      jnp.asarray(mean * noise), jnp.asarray(factor * mean), jnp.zeros(())
    )
  )
  factors = np.linspace(0.7, 1.4, 36)
  best = factors[np.argmin([found(factor) for factor in factors])]
  assert best == pytest.approx(1.0, abs=0.06)
  # What is inherited is not the token's own.
  alone, helped = (
    float(
      damage.divergence_loss(
        jnp.full((9,), 0.13), jnp.zeros((9,)), jnp.full((9,), x)
      )
    )
    for x in (0.0, 1.0)
  )
  assert helped < alone


@pytest.mark.parametrize("preset", ["K10", "S40", "Q5Q16", "J-2L"])
def test_prices_exist_for_every_kind_of_table(preset):
  table = actions.preset(preset)
  low, high = damage.log_prices(cost.net_keep(table), left_out(table))
  assert np.isfinite([low, high]).all() and low < high
  low, high = damage.log_prices(cost.net_keep(table), np.zeros((table.size, 3)))
  assert np.isfinite([low, high]).all() and low < high
