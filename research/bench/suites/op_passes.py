"""Passes of an op, ready to be timed, and their errors.

Of a row's first tokens against float64, and of the whole shape against the
portable implementation in float32.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops.quantized import QTensor
from research.bench.suites.op_cases import Arrays, OpCase, floating

# Tokens of the first row that errors are taken from: the reference is a loop.
_TOKENS = 64
_STEP = 1e-5
# Elements of the largest array up to which all of it is computed in float32: an
# accelerator has the memory, a CPU would take minutes.
_WHOLE, _WHOLE_CPU = 2**27, 2**24
# Passes in one computation on an accelerator, at least: what lies between two
# computations, some 20 us, is shared by them.
_PASSES = 8


def passes_of(sets: Sequence[Arrays], platform: str) -> int:
  """How many passes to time in one computation: as many for each set.

  Args:
    sets: of arrays.
    platform: of the device, such as "gpu".
  """
  least = 1 if platform == "cpu" else _PASSES
  return len(sets) * math.ceil(least / len(sets))


def prepare(
  function: Callable[[Arrays], Any],
  sets: Sequence[Arrays],
  which: str,
  cotangent: jax.Array | None = None,
  passes: int | None = None,
) -> Callable[[], list[Any]]:
  """Returns a call of some passes; outputs begin with y if they can.

  All are one computation, so that starting it from Python, which may take
  longer than a short op, is shared by them.

  Args:
    function: arrays to outputs, y first; to y alone where it is differentiated.
    sets: copies of its arrays that are taken one after the other, so that none
      is found in the cache; see `research.bench.timing.cold_sets`.
    which: "fwd"; "fwd+bwd", both in one computation; or "bwd", from what the
      forward has kept.
    cotangent: of y, (B, L, ...); None for a random one.
    passes: in a call, which takes the sets in turn; one for each by default.
  """
  passes = passes or len(sets)
  if which == "fwd":
    return _one_by_one(function, [(arrays,) for arrays in sets], passes)
  vjp = lambda moved, fixed: jax.vjp(
    lambda values: function({**values, **fixed}), moved
  )
  if cotangent is None:
    cotangent = _cotangent(function, sets[0])
  split = []
  for index, arrays in enumerate(sets):
    moved = floating(arrays)
    fixed = {name: v for name, v in arrays.items() if name not in moved}
    split.append((moved, fixed, jnp.copy(cotangent) if index else cotangent))
  if which == "bwd":
    keep = jax.jit(vjp)
    kept = [(keep(moved, fixed)[1], outer) for moved, fixed, outer in split]
    return _one_by_one(lambda pull, outer: pull(outer), kept, passes)

  def both(moved, fixed, outer):
    y, pull = vjp(moved, fixed)
    return y, pull(outer)[0]

  return _one_by_one(both, split, passes)


def _one_by_one(
  function: Callable[..., Any], arguments: Sequence[tuple], passes: int
) -> Callable[[], list[Any]]:
  """Calls `function` with all arguments, in turn, as one computation."""

  @jax.jit
  def run(arguments):
    found = []
    for own in itertools.islice(itertools.cycle(arguments), passes):
      if found:
        # Each pass depends on the one before, so that the compiler does not run
        # two at a time.
        own, found[-1] = jax.lax.optimization_barrier((own, found[-1]))
      found.append(function(*own))
    return found

  return lambda: run(list(arguments))


def _cotangent(function, arrays) -> jax.Array:
  y = jax.eval_shape(function, arrays)
  values = np.random.default_rng(1).standard_normal(y.shape, np.float32)
  return jnp.asarray(values, y.dtype)


def _float64(arrays: Arrays) -> dict[str, np.ndarray]:
  moved = floating(arrays)

  def one(name, value):
    if isinstance(value, QTensor):
      return value
    value = np.asarray(value)
    return value.astype(np.float64) if name in moved else value

  return {name: one(name, value) for name, value in arrays.items()}


def forward_error(case: OpCase, y: np.ndarray) -> float:
  """Largest error of y's first tokens, relative to their largest value."""
  return _error_of_first(_first_tokens(case), y)


def _first_tokens(case: OpCase) -> np.ndarray:
  """The reference of the first tokens of the first row, in float64."""
  return case.reference(_float64(case.prefix(_TOKENS)))


def _error_of_first(expected: np.ndarray, y: np.ndarray) -> float:
  found = np.asarray(y)[:1, : expected.shape[1]].astype(np.float64)
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def backward_error(case: OpCase, implementation: str) -> float:
  """Relative error of the gradient along one random direction.

  The reference's derivative is a central difference in float64. The direction
  is scaled such that the gradient of each array counts alike.
  """
  arrays = case.prefix(_TOKENS)
  function = lambda arrays: case.call(arrays, implementation)
  ((_, gradients),) = prepare(function, [arrays], "fwd+bwd")()
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


def compared(output: Any, which: str) -> Any:
  """What a pass is judged by: y of "fwd", else the gradients by name."""
  if which == "fwd":
    return y_of(output)
  return output[0 if which == "bwd" else 1]


def whole(case: OpCase, backward: bool) -> Any | None:
  """The whole y, or all gradients, of the XLA implementation in float32.

  Args:
    case: the op and its arrays, whose values are taken as they are.
    backward: whether it is the gradients, those of `prepare`'s cotangent.

  Returns:
    y (B, L, ...) or the gradients by name; None where an array is so large
    that this would take long or not fit.
  """
  largest = max(value.size for value in case.arrays.values())
  cpu = jax.default_backend() == "cpu"
  if largest > (_WHOLE_CPU if cpu else _WHOLE):
    return None
  function = lambda arrays: case.call(arrays, "xla")
  exact = {n: v.astype(jnp.float32) for n, v in floating(case.arrays).items()}
  which, outer = "fwd", None
  if backward:
    which, outer = "fwd+bwd", _cotangent(function, case.arrays)
    outer = outer.astype(jnp.float32)
  with jax.default_matmul_precision("highest"):
    call = prepare(function, [{**case.arrays, **exact}], which, outer)
    (output,) = call()
    return compared(output, which)


@jax.jit
def _relative(found: jax.Array, expected: jax.Array) -> jax.Array:
  norm = lambda v: jnp.sqrt(jnp.sum(jnp.square(v.astype(jnp.float32))))
  tiny = jnp.finfo(jnp.float32).tiny
  return norm(found - expected) / jnp.maximum(norm(expected), tiny)


def full_error(found: Any, expected: Any) -> float:
  """Relative L2 error; of several arrays, such as gradients, the worst."""
  errors = jax.tree.map(_relative, found, expected)
  return max(float(error) for error in jax.tree.leaves(errors))


class Errors:
  """Errors of the implementations of one case; a reference is computed once.

  Args:
    case: the op and its arrays.
  """

  def __init__(self, case: OpCase):
    self._case = case
    self._first: np.ndarray | None = None
    self._whole: dict[bool, Any] = {}
    self._backward: dict[str, float] = {}

  def of(
    self, implementation: str, which: str, output: Any
  ) -> dict[str, float | str | None]:
    """Returns a row's columns of an output of `prepare`.

    Where the whole reference could not be had, "no_error_full" says why.
    """
    case, backward = self._case, which != "fwd"
    if not backward:
      if self._first is None:
        self._first = _first_tokens(case)
      error = _error_of_first(self._first, y_of(output))
    else:
      if implementation not in self._backward:
        self._backward[implementation] = backward_error(case, implementation)
      error = self._backward[implementation]
    if backward not in self._whole:
      try:
        self._whole[backward] = jax.block_until_ready(whole(case, backward))
      except Exception as problem:  # Such as out of memory.
        self._whole[backward] = " ".join(str(problem).split())[:200]
    expected = self._whole[backward]
    if isinstance(expected, str):
      return {"error": error, "error_full": None, "no_error_full": expected}
    full = None
    if expected is not None:
      full = full_error(compared(output, which), expected)
    return {"error": error, "error_full": full}
