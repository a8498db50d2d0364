"""Text sampled from a model, by decoding over its key/value cache."""

import functools

import jax
import jax.numpy as jnp

from models import transformer
from models.transformer_config import TransformerConfig


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
