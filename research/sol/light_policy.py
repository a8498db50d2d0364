"""Policies of a few hundred or thousand weights, which cost next to nothing.

"scalars": the nine scalars of `observation.SCALARS`, known anyway at decode
time, through an MLP of 16 units, beside the linear map that the counterfactual
regression is. "head": the same with a projection of rank r of a hidden state
that is there anyway: the last layer's of the previous token, or the embedding
of the token just read. Both have the gain head of `research/sol/policy.py`,
no attention, and no memory of their own.

Axis letters: W windows, R rollouts, T steps, D width of the LLM, A actions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import layers, module
from research.sol import damage as damage_lib
from research.sol import observation
from research.sol.observation import Observation

# Units of the MLP.
_UNITS = 16
KINDS = ("scalars", "head")
# Matrix products of a decision: the projection, two of the MLP, the linear map.
PRODUCTS = {"scalars": 3, "head": 4}


def gain_logits(
  costs: np.ndarray,
  temperature: float,
  raw: jax.Array,
  goal: jax.Array,
  damage: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Logits (..., A) and sensitivities (..., 3), see `research/sol/policy.py`.

  Args:
    costs: (A,) of the actions.
    temperature: of the softmax, in units of cost.
    raw: (..., 3) logarithms of sensitivities, unbounded.
    goal: (..., 1) price.
    damage: (A, 3).
  """
  sensitivity = damage_lib.sensitivity(raw)
  gains = damage_lib.gains(sensitivity, damage)
  costs = costs.reshape((1,) * (goal.ndim - 1) + (-1,))
  return (gains / goal - costs) / temperature, sensitivity


class LightPolicy(module.Model):
  """A linear map of features plus a small MLP, step by step."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs):
    """At the start it is the best static action, as a new gain head is.

    Args:
      config: a `PolicyConfig` whose `kind` is one of `KINDS`.
      rngs: of the weights.
    """
    c = config
    self.config = c
    linear = functools.partial(layers.Linear, use_bias=True, rngs=rngs)
    size = len(observation.SCALARS)
    projected = c.kind == "head"
    self.project = (
      layers.Linear(c.lm_width, c.rank, rngs=rngs) if projected else None
    )
    size += c.rank * projected
    self.first = linear(size + 1, _UNITS)
    self.second = linear(_UNITS, 3)
    self.second.rescale(0.0)
    self.linear = linear(size, 3)
    self.linear.rescale(0.0)

  def logits(
    self, seen: Observation, goal: jax.Array, damage: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Logits (..., A) and sensitivities (..., 3).

    Args:
      seen: (...), standardised.
      goal: (..., 1) price.
      damage: (A, 3).
    """
    c = self.config
    x = seen.scalars
    if self.project is not None:
      source = seen.hidden if c.source == "hidden" else seen.embed
      x = jnp.concatenate([x, self.project(source)], axis=-1)
    with_price = jnp.concatenate([x, jnp.log(goal)], axis=-1)
    raw = self.linear(x) + self.second(jax.nn.gelu(self.first(with_price)))
    return gain_logits(c.costs, c.temperature, raw, goal, damage)

  def __call__(
    self, seen: Observation, goal: jax.Array, damage: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Of whole episodes, as `Policy`: `seen` (W, R, T), `goal` (W, R)."""
    shape = (*seen.step.shape, goal.shape[2])
    return self.logits(seen, jnp.broadcast_to(goal[:, :, None], shape), damage)

  def step(
    self, seen: Observation, goal: jax.Array, damage: jax.Array, cache: Any
  ) -> tuple[jax.Array, Any]:
    """Logits (W, R, A) of one step, and the cache as it was: there is none."""
    return self.logits(seen, goal, damage)[0], cache


def rounded(params: Any, bits: int) -> Any:
  """Weights as integers of so many bits hold them, a scale an output column.

  Biases, which are few, are rounded with their neighbours alike: a scale each
  vector. 16 bits leave all as it is.

  Args:
    params: nested dict of float arrays (..., n).
    bits: 8 or 16.
  """
  if bits == 16:
    return params
  most = 2.0 ** (bits - 1) - 1

  def one(x):
    axis = 0 if x.ndim > 1 else None
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / most
    scale = jnp.maximum(scale, 1e-12)
    return jnp.round(x / scale) * scale

  return jax.tree.map(one, params)
