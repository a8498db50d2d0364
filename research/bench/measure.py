"""Passes of an op, ready to be timed, and their errors against float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.bench.cases import Arrays, Case, floating

# Tokens of the first row that errors are taken from: the reference is a loop.
_TOKENS = 64
_STEP = 1e-5


def prepare(
  function: Callable[[Arrays], Any], arrays: Arrays, which: str
) -> Callable[[], Any]:
  """Returns a call of one pass; what it returns begins with y where there is y.

  Args:
    function: arrays to outputs, y first; to y alone where it is differentiated.
    arrays: its arrays.
    which: "fwd"; "fwd+bwd", both in one computation; or "bwd", from what the
      forward has kept.
  """
  if which == "fwd":
    forward = jax.jit(function)
    return lambda: forward(arrays)
  moved = floating(arrays)
  fixed = {name: v for name, v in arrays.items() if name not in moved}
  vjp = lambda moved, fixed: jax.vjp(
    lambda values: function({**values, **fixed}), moved
  )
  outer = _cotangent(function, arrays)
  if which == "bwd":
    _, pull = jax.jit(vjp)(moved, fixed)
    backward = jax.jit(lambda pull, outer: pull(outer))
    return lambda: backward(pull, outer)

  @jax.jit
  def both(moved, fixed, outer):
    y, pull = vjp(moved, fixed)
    return y, pull(outer)[0]

  return lambda: both(moved, fixed, outer)


def _cotangent(function, arrays) -> jax.Array:
  y = jax.eval_shape(function, arrays)
  values = np.random.default_rng(1).standard_normal(y.shape, np.float32)
  return jnp.asarray(values, y.dtype)


def _float64(arrays: Arrays) -> dict[str, np.ndarray]:
  moved = floating(arrays)
  return {
    name: np.asarray(v).astype(np.float64) if name in moved else np.asarray(v)
    for name, v in arrays.items()
  }


def forward_error(case: Case, y: np.ndarray) -> float:
  """Largest error of y's first tokens, relative to their largest value."""
  expected = case.reference(_float64(case.prefix(_TOKENS)))
  found = np.asarray(y)[:1, :_TOKENS].astype(np.float64)
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def backward_error(case: Case, implementation: str) -> float:
  """Relative error of the gradient along one random direction.

  The reference's derivative is a central difference in float64. The direction
  is scaled such that the gradient of each array counts alike.
  """
  arrays = case.prefix(_TOKENS)
  function = lambda arrays: case.call(arrays, implementation)
  _, gradients = prepare(function, arrays, "fwd+bwd")()
  outer = np.asarray(_cotangent(function, arrays)).astype(np.float64)
  exact, rng = _float64(arrays), np.random.default_rng(0)
  found, directions = 0.0, {}
  for name, gradient in gradients.items():
    gradient = np.asarray(gradient).astype(np.float64)
    direction = rng.normal(size=gradient.shape)
    direction /= max(np.linalg.norm(gradient), np.finfo(np.float32).tiny)
    directions[name] = direction
    found += np.sum(gradient * direction)

  def loss(step):
    moved = {name: exact[name] + step * d for name, d in directions.items()}
    return np.sum(outer * case.reference(exact | moved))

  expected = (loss(_STEP) - loss(-_STEP)) / (2 * _STEP)
  return float(abs(found - expected) / np.sqrt(len(directions)))


def y_of(output: Any) -> jax.Array:
  """y, which is the first of the outputs."""
  return jnp.asarray(jax.tree.leaves(output)[0])
