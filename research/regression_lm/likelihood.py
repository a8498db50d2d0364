"""Probabilities of target tokens, renormalised over what the grammar allows.

Shapes by axis letter: B texts, S rows of targets a text, T tokens of a row, O
objectives, V target tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from models import regression_lm
from models.numbers import MISSING, TargetCodec
from models.regression_lm import Compute, Memory, Params
from models.regression_lm_config import RegressionLMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """All that is static about a model: it can be an argument of `jax.jit`.

  Attributes:
    config: its shape.
    codec: of its targets.
    compute: how passes are computed.
  """

  config: RegressionLMConfig
  codec: TargetCodec
  compute: Compute = Compute()

  def next_state(self) -> jax.Array:
    """The table of the grammar, (states, V)."""
    return jnp.asarray(self.codec.grammar.next_state)


def states(table: jax.Array, targets: jax.Array) -> jax.Array:
  """The grammar's state in front of every token of targets (..., T).

  In front of and within a missing number it is 0.
  """

  def step(state, token):
    return jnp.maximum(table[state, token], 0), state

  start = jnp.zeros(targets.shape[:-1], jnp.int32)
  _, found = jax.lax.scan(step, start, jnp.moveaxis(targets, -1, 0))
  return jnp.moveaxis(found, 0, -1)


def restrict(
  table: jax.Array, state: jax.Array, logits: jax.Array
) -> jax.Array:
  """Logits (..., V) with -inf where state (...) does not allow the token."""
  return jnp.where(table[state] >= 0, logits, -jnp.inf)


def token_logprobs(
  model: Model,
  params: Params,
  memory: Memory,
  targets: jax.Array,
  *,
  dropout: float = 0.0,
  key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of every target token given those before it.

  Args:
    model: the model.
    params: of it.
    memory: of B texts.
    targets: (B, S, T) int32, missing objectives as `MISSING`.
    dropout: in training.
    key: of dropout.

  Returns:
    Log-probabilities and log normalizers, float32 (B, S, T); 0 where an
    objective is missing.
  """
  logits = regression_lm.logits(
    model.config,
    params,
    memory,
    targets,
    compute=model.compute,
    dropout=dropout,
    key=key,
  )
  table = model.next_state()
  logits = restrict(table, states(table, targets), logits)
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  there = targets != MISSING
  # Values are selected before the subtraction, so that no -inf meets a
  # gradient.
  chosen = jnp.where(there, chosen, 0.0)
  normalizer = jnp.where(there, normalizer, 0.0)
  return chosen - normalizer, normalizer


def by_objective(model: Model, x: jax.Array) -> jax.Array:
  """Sums (..., T) over the tokens of each objective: (..., O)."""
  return x.reshape(*x.shape[:-1], model.codec.num_objectives, -1).sum(-1)
