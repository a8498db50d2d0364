"""Random schedules to learn gains from.

Axis letters: W windows, R rollouts, T steps, A actions.

Uniform schedules spend most of their steps in damage that no policy would
choose, and the gains that matter drown in it. Once mean gains are known,
schedules are drawn around what each price would buy: close enough to the
budgets in question, random enough to compare all neighbouring actions.
"""

import jax
import jax.numpy as jnp
import numpy as np

# In units of cost: neighbouring levels differ by less, at every price.
TEMPERATURE = 0.1


def draw(
  costs: np.ndarray,
  gains: jax.Array,
  price: jax.Array,
  horizon: int,
  key: jax.Array,
) -> jax.Array:
  """Schedules (W, R, T) int32, independent from step to step.

  Within a group of rollouts of one price, actions of different steps are
  independent, so that no gain is credited to its neighbours.

  Args:
    costs: (A,) cost of each action.
    gains: (A,) mean gain of each action in nats.
    price: (W, R) nats a unit of cost.
    horizon: T.
    key: randomness.
  """
  logits = _logits(costs, gains, price)
  shape = (horizon, *price.shape)
  draws = jax.random.categorical(key, logits[None], axis=-1, shape=shape)
  return jnp.moveaxis(draws, 0, -1).astype(jnp.int32)


def mean_damage(
  costs: np.ndarray, gains: jax.Array, price: jax.Array
) -> jax.Array:
  """Mean damage in nats of what `draw` draws at a price: (W, R).

  Args:
    costs: (A,) cost of each action.
    gains: (A,) mean gain of each action in nats; the best one does no damage.
    price: (W, R) nats a unit of cost.
  """
  chance = jax.nn.softmax(_logits(costs, gains, price), axis=-1)
  damage = jnp.max(gains) - gains
  return jnp.sum(chance * damage[None, None], axis=-1)


def gain_scale(
  costs: np.ndarray, gains: jax.Array, price: jax.Array
) -> jax.Array:
  """Standard deviation of mean gains that `draw` tries at a price: (W, R).

  Signal and noise of a token's gain both grow with it, so its square weighs
  prices against each other. It knows the price and not the outcome: weights
  that look at a group's own variance forget the sensitive tokens.

  Args:
    costs: (A,) cost of each action.
    gains: (A,) mean gain of each action in nats.
    price: (W, R) nats a unit of cost.
  """
  chance = jax.nn.softmax(_logits(costs, gains, price), axis=-1)
  mean = jnp.sum(chance * gains[None, None], axis=-1, keepdims=True)
  variance = jnp.sum(chance * jnp.square(gains[None, None] - mean), axis=-1)
  return jnp.sqrt(variance + 1e-3)


def _logits(costs, gains, price):
  value = gains[None, None] / price[..., None] - costs[None, None]
  return value / TEMPERATURE
