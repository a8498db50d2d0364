"""What quantizing costs where a model runs for long: token after token.

A pass over a whole text never rounds a recurrent state between tokens; decoding
does so at every one. Both models read the same tokens, each with a state of its
own. Shapes by axis letter: B rows, T tokens, V vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import errors, language_model
from models.module import Params
from research.decoding import loop
from research.decoding.plain import Plain
from research.decoding.sampling import Sampling

Model = tuple[language_model.Config, Params]


def along(first: Model, second: Model, tokens: np.ndarray) -> dict[str, Any]:
  """Two models decode the same tokens, one after the other.

  Args:
    first: the model that is compared with.
    second: the other one; of the same vocabulary.
    tokens: (B, T) int32.

  Returns:
    Of every token but the first, behind those before it, (B, T - 1) float32:
      first: negative log-likelihood in nats,
      second: the same of the other model,
      kl: divergence of the second's distribution from the first's.

  Raises:
    InputError: the logits of one are not finite.
  """
  found = _along(first[0], second[0], first[1], second[1], jnp.asarray(tokens))
  found = jax.device_get(found)
  if not all(np.isfinite(value).all() for value in found.values()):
    raise errors.not_finite()
  return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _along(first, second, first_params, second_params, tokens):
  size = tokens.shape[1]
  pair = ((first, first_params), (second, second_params))
  logits, states = zip(*(_begin(*one, tokens[:, :1], size) for one in pair))

  def step(carry, token):
    logits, states = carry
    one, other = (jax.nn.log_softmax(scores) for scores in logits)
    take = lambda p: -jnp.take_along_axis(p, token[:, None], axis=-1)[:, 0]
    kl = jnp.sum(jnp.exp(one) * (one - other), axis=-1)
    found = {"first": take(one), "second": take(other), "kl": kl}
    logits, states = zip(
      *(_read(*one, token, state) for one, state in zip(pair, states))
    )
    return (logits, states), found

  _, found = jax.lax.scan(step, (logits, states), tokens[:, 1:].T)
  return jax.tree.map(lambda v: v.T, found)


def continuation(
  model: Model, prompts: np.ndarray, *, tokens: int, seed: int
) -> np.ndarray:
  """Draws from a model's own distribution, whatever token comes.

  Args:
    model: to draw from.
    prompts: (B, P) int32.
    tokens: how many.
    seed: of the draws.

  Returns:
    (B, P + tokens) int32, the prompts first.

  Raises:
    InputError: logits are not finite.
  """
  config, params = model
  method = Plain(config=config, sampling=Sampling())
  lengths = jnp.full((len(prompts),), prompts.shape[1], jnp.int32)
  batch, first = loop.begin(
    method,
    params,
    jnp.asarray(prompts),
    lengths,
    jax.random.key(seed),
    cache_size=prompts.shape[1] + tokens,
  )
  _, rest = loop.advance(method, params, batch, steps=tokens - 1)
  drawn = [np.asarray(found.tokens[..., 0]) for found in (first, rest)]
  if any((part == loop.BROKEN).any() for part in drawn):
    raise errors.not_finite()
  return np.concatenate([prompts, *drawn], axis=1)


def _begin(config, params, tokens, cache_size):
  """Logits (B, V) behind the tokens (B, P), and the state."""
  lengths = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
  hidden, state = language_model.prefill(
    config, params, tokens, lengths, cache_size=cache_size
  )
  return language_model.logits(config, params, hidden[:, -1]), state


def _read(config, params, token, state):
  """Logits (B, V) behind one more token (B,), and the state."""
  logits, state = language_model.decode(config, params, token[:, None], state)
  return logits[:, 0], state


def repetition(tokens: np.ndarray, length: int = 4) -> np.ndarray:
  """Share of runs of `length` tokens that a row (B, T) had before, (B,)."""
  shares = []
  for row in tokens:
    runs = [tuple(row[i : i + length]) for i in range(len(row) - length + 1)]
    shares.append(1 - len(set(runs)) / len(runs))
  return np.asarray(shares)


def near(values: Mapping[str, Any], token: int, width: int = 8) -> np.ndarray:
  """Mean KL of each row over the last `width` tokens up to the `token`-th."""
  kl = np.asarray(values["kl"])
  return kl[:, max(0, token - width) : token].mean(axis=1)
