"""Credit of a step with later steps' own actions taken out of the return.

The reward to go of step t carries the own-step effects of every later action:
noise for step t, and most of it. Within a group of K counterfactual rollouts
of one text those effects can be seen and removed.
"""

import jax
import jax.numpy as jnp


def residual_to_go(
  rewards: jax.Array,
  controls: jax.Array,
  gamma: float,
  *,
  ridge: float = 1e-2,
) -> jax.Array:
  """Reward of the own step plus discounted later rewards' residuals.

    G[k, t] = r[k, t] + sum_{s > t} gamma^(s - t) (r[k, s] - fit_s(x[k, s]))

  where fit_s is a ridge regression, within the group and at step s, of the
  rewards on the controls that step s itself used. With gamma = 0 it is the
  own reward; where controls do not vary it is the plain reward to go, centred.

  Args:
    rewards: (B, K, T) nats.
    controls: (B, K, T, C) numbers that describe each action.
    gamma: discount.
    ridge: penalty relative to the controls' mean square.

  Returns:
    (B, K, T).
  """
  centre = lambda x: x - jnp.mean(x, axis=1, keepdims=True)
  x, y = centre(controls), centre(rewards)
  gram = jnp.einsum("bktc,bktd->btcd", x, x)
  scale = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
  size = controls.shape[-1]
  gram = gram + (ridge * scale / size + 1e-9) * jnp.eye(size)[None, None]
  slope = jnp.linalg.solve(gram, jnp.einsum("bktc,bkt->btc", x, y)[..., None])
  residual = y - jnp.einsum("bktc,btc->bkt", x, slope[..., 0])

  def step(later, now):
    own, rest = now
    return gamma * (later + rest), own + later

  over_time = jax.tree.map(lambda z: jnp.moveaxis(z, 2, 0), (rewards, residual))
  _, total = jax.lax.scan(
    step, jnp.zeros_like(rewards[..., 0]), over_time, reverse=True
  )
  return jnp.moveaxis(total, 0, 2)
