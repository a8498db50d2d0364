"""Text sampled from a model, by decoding over its key/value cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from models import transformer
from models.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is drawn from the model's distribution.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
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
  """Draws one token a row, each row with a key of its own.

  Args:
    keys: (B,) keys; not used at temperature 0.
    logits: (B, V) float32.
    sampling: static.

  Returns:
    (B,) int32.
  """
  if sampling.temperature == 0.0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  scaled = logits.astype(jnp.float32) / sampling.temperature
  pick = jax.vmap(jax.random.categorical)
  vocab_size = logits.shape[-1]
  if sampling.top_p == 1.0 and not 0 < sampling.top_k < vocab_size:
    return pick(keys, scaled).astype(jnp.int32)
  kept = min(sampling.top_k or vocab_size, vocab_size)
  values, tokens = jax.lax.top_k(scaled, kept)
  if sampling.top_p < 1.0:
    chances = jax.nn.softmax(values, axis=-1)
    likelier = jnp.cumsum(chances, axis=-1) - chances
    # The likeliest token has none before it; rounding must not drop it.
    likelier = likelier.at[:, 0].set(0.0)
    values = jnp.where(likelier < sampling.top_p, values, -jnp.inf)
  rank = pick(keys, values)[:, None]
  return jnp.take_along_axis(tokens, rank, axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def sample(
  config: TransformerConfig,
  params: transformer.Params,
  prompt: jax.Array,
  key: jax.Array,
  length: int,
  temperature: float = 1.0,
) -> jax.Array:
  """Continues prompts by ancestral sampling.

  Args:
    config: of the model.
    params: of the model.
    prompt: (B, T) int32, at least one token.
    key: randomness.
    length: tokens to add; T + length stays within the trained context.
    temperature: divides the logits.

  Returns:
    (B, T + length) int32, the prompt included.
  """
  hidden, cache = transformer.prefill(
    config, params, prompt, cache_size=prompt.shape[1] + length
  )
  model = transformer.bind(config, params)

  def draw(key, logits):
    token = jax.random.categorical(key, logits / temperature, axis=-1)
    return token.astype(jnp.int32)

  def step(carry, step_key):
    token, cache = carry
    logits, cache = transformer.decode(config, params, token[:, None], cache)
    following = draw(step_key, logits[:, 0])
    return (following, cache), token

  keys = jax.random.split(key, length)
  first = draw(keys[0], model.logits(hidden[:, -1]))
  (last, _), tokens = jax.lax.scan(step, (first, cache), keys[1:])
  tokens = jnp.concatenate([tokens, last[None]], axis=0)
  return jnp.concatenate([prompt, tokens.T], axis=1)
