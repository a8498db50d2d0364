"""What a controller may look at before it picks the action of a token.

Everything here is known at decode time before the token is computed: the
previous token's hidden state and logits (both as computed under the actions)
and the token that was just read.
"""

import dataclasses

import jax
import jax.numpy as jnp

SCALARS = (
  "surprise",
  "entropy",
  "previous surprise",
  "mean surprise",
  "surprise x entropy",
  "log(1 + surprise)",
  "max |h|",
  "norm of h",
  "norm of e(x)",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
  """One step (W, R, ...) or a whole episode (W, R, T, ...).

  Attributes:
    hidden: (..., D) last hidden state of the previous token, under actions.
    embed: (..., D) input embedding of the token just read, x_t.
    scalars: (..., 9), see `SCALARS`: surprise -log p(x_t), entropy of the
      logits that predicted it, surprise of x_{t-1}, running mean surprise,
      products of these, and norms. Nats.
    drift: (...) 1 - cosine between the two last hidden states.
    previous: (...) int32 action of the previous step; A at the first step.
    spent: (..., 3) running mean of (kappa, rho, bits / 16) so far; 0 at the
      first step.
    step: (...) int32 step in the episode.
  """

  hidden: jax.Array
  embed: jax.Array
  scalars: jax.Array
  drift: jax.Array
  previous: jax.Array
  spent: jax.Array
  step: jax.Array


def scalars(
  surprise: jax.Array,
  entropy: jax.Array,
  previous_surprise: jax.Array,
  mean_surprise: jax.Array,
  hidden: jax.Array,
  embed: jax.Array,
) -> jax.Array:
  """Stacks the nine scalars (..., 9) in float32 (order of `SCALARS`)."""
  hidden = hidden.astype(jnp.float32)
  embed = embed.astype(jnp.float32)
  norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
  return jnp.stack(
    [
      surprise,
      entropy,
      previous_surprise,
      mean_surprise,
      surprise * entropy,
      jnp.log1p(surprise),
      jnp.max(jnp.abs(hidden), axis=-1),
      norm(hidden),
      norm(embed),
    ],
    axis=-1,
  )


def drift(hidden: jax.Array, previous: jax.Array) -> jax.Array:
  """1 - cosine similarity of (..., D) vectors."""
  hidden = hidden.astype(jnp.float32)
  previous = previous.astype(jnp.float32)
  dot = jnp.sum(hidden * previous, axis=-1)
  norms = jnp.sum(jnp.square(hidden), -1) * jnp.sum(jnp.square(previous), -1)
  return 1.0 - dot * jax.lax.rsqrt(norms + 1e-12)
