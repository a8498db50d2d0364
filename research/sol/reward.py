"""Rewards to go, and the price of missing a budget.

Axis letters: B sequences, K rollouts of a sequence (the group), T steps.
Source: SOL (arXiv 2605.10875).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def returns_to_go(
  rewards: jax.Array, gamma: float, mask: jax.Array | None = None
) -> jax.Array:
  """Sums discounted rewards from each step on.

    G_t = r_t + gamma * G_{t+1}

  Args:
    rewards: (..., T) float.
    gamma: Discount.
    mask: (..., T), 1 for effective steps; the others reward nothing.

  Returns:
    (..., T).
  """
  if mask is not None:
    rewards = jnp.where(mask, rewards, 0)
  steps = jnp.arange(rewards.shape[-1])
  ahead = steps[:, None] - steps[None, :]
  weights = jnp.where(ahead >= 0, gamma ** jnp.maximum(ahead, 0), 0.0)
  # The product takes the highest precision, because TF32 has fewer digits than
  # small advantages need.
  return jnp.matmul(
    rewards, weights.astype(rewards.dtype), precision=jax.lax.Precision.HIGHEST
  )


def dead_zone_penalty(
  gap: jax.Array,
  weights: Sequence[float] = (100.0, 100.0, 200.0),
  tolerance: float = 0.02,
) -> jax.Array:
  """Charges the square of how far a mean is off its target, on both sides.

    penalty = sum_f weight_f * max(|gap_f| - tolerance, 0)^2

  Args:
    gap: (..., F) episode mean minus target.
    weights: F weights.
    tolerance: Half width of the zone that costs nothing.

  Returns:
    (...).
  """
  beyond = jnp.maximum(jnp.abs(gap) - tolerance, 0)
  weights = jnp.broadcast_to(jnp.asarray(weights, gap.dtype), gap.shape)
  return jnp.sum(jnp.square(beyond) * weights, axis=-1)
