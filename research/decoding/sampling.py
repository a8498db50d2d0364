"""How a token is drawn from logits."""

import dataclasses

import jax
import jax.numpy as jnp

# At such a temperature a float32 logit that is smaller by one bit has no
# chance; far below it the quotients would overflow.
_GREEDY = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is drawn from the model's distribution.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token, and so does
      what is hardly more.
    top_k: draws among the k likeliest tokens alone; 0 among all.
    top_p: draws among the fewest likeliest tokens that together have this
      probability or more, counted after `temperature` and `top_k` (nucleus
      sampling, Holtzman et al. 2020); 1 among all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    """Checks the ranges; raises ValueError."""
    if not 0.0 <= self.temperature < float("inf"):
      raise ValueError(f"temperature={self.temperature} is not in [0, inf)")
    if self.top_k < 0:
      raise ValueError(f"top_k={self.top_k} is negative")
    if not 0.0 < self.top_p <= 1.0:
      raise ValueError(f"top_p={self.top_p} is not in (0, 1]")


def draw(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
  """Draws one token a row.

  Args:
    keys: (B,) keys, one a row, or one () for all; not used at temperature 0.
    logits: (B, V) float32.
    sampling: static.

  Returns:
    (B,) int32.
  """
  if sampling.temperature <= _GREEDY:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  scaled = logits.astype(jnp.float32) / sampling.temperature
  pick = jax.random.categorical
  pick = jax.vmap(pick) if keys.ndim else pick
  vocab_size = logits.shape[-1]
  if sampling.top_p == 1.0 and not 0 < sampling.top_k < vocab_size:
    return pick(keys, scaled).astype(jnp.int32)
  kept = min(sampling.top_k or vocab_size, vocab_size)
  values, tokens = jax.lax.top_k(scaled, kept)
  if sampling.top_p < 1.0:
    chances = jax.nn.softmax(values, axis=-1)
    likelier = jnp.cumsum(chances, axis=-1) - chances
    # The sum before the likeliest token is set to zero, so that rounding never
    # drops that token.
    likelier = likelier.at[:, 0].set(0.0)
    values = jnp.where(likelier < sampling.top_p, values, -jnp.inf)
  rank = pick(keys, values)[:, None]
  return jnp.take_along_axis(tokens, rank, axis=-1)[:, 0].astype(jnp.int32)
