"""What rounding to formats costs, of drawn numbers and of a model's kernels.

Shapes by axis letter: D rows that a product sums over, F columns.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.module import Params
from ops.quantized import (
  FORMATS,
  Searched,
  absmax,
  dequantize,
  is_quantized,
  quantize,
)
from research.quantization import gptq

Row = dict[str, Any]
# Degrees of freedom that are tried (first, last, how many), and numbers of a
# kernel that are looked at.
_NU = 1.5, 100.0, 48
_LOOKED_AT = 16384


def draws(seed: int, size: int) -> dict[str, jax.Array]:
  """Arrays (size, 4096) of normal, t and Laplace numbers by name.

  Args:
    seed: of the draw.
    size: rows.
  """
  rng = np.random.default_rng(seed)
  shape = size, 4096
  found = {"normal": rng.normal(size=shape)}
  found |= {f"t, {nu}": rng.standard_t(nu, shape) for nu in (10, 5, 3)}
  found["Laplace"] = rng.laplace(size=shape)
  return {name: jnp.asarray(x, jnp.float32) for name, x in found.items()}


def t_draws(seed: int, size: int) -> dict[str, jax.Array]:
  """Arrays (size, 4096) of Student's t by name, 3 to 10 degrees of freedom."""
  rng = np.random.default_rng(seed)
  return {
    f"t, {nu}": jnp.asarray(rng.standard_t(nu, (size, 4096)), jnp.float32)
    for nu in range(3, 11)
  }


def kernels(params: Params) -> dict[str, jax.Array]:
  """Kernels of a model's layers by dotted path, as (..., F, D)."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }
  return {
    name: jnp.swapaxes(leaf, -1, -2)
    for name, leaf in named.items()
    if name.endswith(".kernel") and not is_quantized(leaf) and leaf.ndim >= 2
  }


def rows(
  arrays: Mapping[str, jax.Array], names: Sequence[str]
) -> Iterator[Row]:
  """Rows of a result file: decibels of signal over noise, and true bits.

  Args:
    arrays: (..., D) by name; blocks lie along the last axis.
    names: of formats.

  Yields:
    A row an array and format.

  Raises:
    ValueError: there is no such format.
  """
  for data, x in arrays.items():
    for name in names:
      form = gptq.fitting(FORMATS[name], x.shape[-1])
      signal, noise, bits = _errors(x, form)
      yield {
        "system": "formats",
        "data": data,
        "method": name,
        "metric": "decibels",
        "value": float(10 * np.log10(signal / max(noise, 1e-30))),
        "bits": float(bits),
        "numbers": x.size,
      }


def _errors(x, form):
  """Sums of squares of an array and of what rounding leaves; bits a number."""

  def run(x):
    q = quantize(x, form)
    error = dequantize(q, dtype=jnp.float32) - x
    return q, jnp.sum(jnp.square(error))

  # Scales of a second level belong to a layer, as in a model.
  for _ in range(x.ndim - 2):
    run = jax.vmap(run)
  q, noise = jax.jit(run)(x)
  signal = float(jnp.sum(jnp.square(x.astype(jnp.float32))))
  return signal, float(jnp.sum(noise)), 8 * q.nbytes / q.size


def over_lloyd_max(
  arrays: Mapping[str, jax.Array], names: Sequence[str]
) -> Iterator[Row]:
  """How much more than the best codebook of blocks of 128 formats err.

  Args:
    arrays: (..., D) by name; blocks lie along the last axis.
    names: of formats of 4 bits, "+clipped" behind those whose scales search.

  Yields:
    A row an array and format: the ratio of squared errors, less one.
  """
  for data, x in arrays.items():
    least = lloyd_max(np.asarray(x), 16)
    for name in names:
      form, _, clipped = name.partition("+")
      observer = Searched() if clipped else absmax
      _, error = _round_trip(x, FORMATS[form], observer)
      yield {
        "system": "formats",
        "data": data,
        "method": name,
        "metric": "over_lloyd_max",
        "value": float(error) / least - 1,
        "numbers": x.size,
      }


@functools.partial(jax.jit, static_argnames=("form", "observer"))
def _round_trip(x, form, observer):
  """A QTensor, and the squared error of what comes back."""
  q = quantize(x, form, observer=observer)
  return q, jnp.sum(jnp.square(dequantize(q, dtype=jnp.float32) - x))


def lloyd_max(
  x: np.ndarray, count: int, group: int = 128, rounds: int = 2000
) -> float:
  """The squared error of the best codebook, by Lloyd's algorithm in float64.

  Levels are shares of the largest magnitude of a block, with scales in
  bfloat16, as in formats whose codebook is fitted.

  Args:
    x: (..., D).
    count: levels.
    group: neighbours that share a scale.
    rounds: of the algorithm.
  """
  blocks = x.astype(np.float64).reshape(-1, group)
  scales = np.abs(blocks).max(1, keepdims=True)
  scales = scales.astype(jnp.bfloat16).astype(np.float64)
  scales = np.where(scales == 0, 1, scales)
  values, weights = (blocks / scales).ravel(), np.repeat(scales**2, group)
  order = np.argsort(values)
  values, weights = values[order], weights[order]
  sums = [
    np.concatenate([[0], np.cumsum(weights * values**power)])
    for power in (0, 1, 2)
  ]
  book = np.linspace(-1, 1, count)
  for _ in range(rounds):
    ends = np.searchsorted(values, (book[1:] + book[:-1]) / 2)
    ends = np.concatenate([[0], ends, [len(values)]])
    weight, first, second = (s[ends[1:]] - s[ends[:-1]] for s in sums)
    book = np.where(weight > 0, first / np.maximum(weight, 1e-300), book)
  return float(np.sum(second - 2 * book * first + book**2 * weight))


def tails(arrays: Mapping[str, jax.Array]) -> Iterator[Row]:
  """How heavy the tails of arrays are.

  Args:
    arrays: (..., D) by name, or (L, ..., D) of L layers where there are more
      than two axes; of large ones some numbers are looked at.

  Yields:
    Of each array or layer the degrees of freedom of the likeliest t
    distribution, and the Kolmogorov-Smirnov distance to it and to the likeliest
    normal one; both have mean zero.
  """
  parts = [
    (data, layer, part)
    for data, x in arrays.items()
    for layer, part in (enumerate(x) if x.ndim > 2 else [(None, x)])
  ]
  for data, layer, x in parts:
    values = np.asarray(x, np.float64).ravel()
    if values.size > _LOOKED_AT:
      values = np.random.default_rng(0).choice(values, _LOOKED_AT, False)
    for metric, value in fit_tails(values).items():
      yield {
        "system": "formats",
        "data": data,
        "layer": layer,
        "method": "tails",
        "metric": metric,
        "value": value,
        "numbers": values.size,
      }


def fit_tails(values: np.ndarray) -> dict[str, float]:
  """Fits Student's t and a normal distribution, both of mean zero.

  Args:
    values: (N,) finite, not all zero.

  Returns:
    "nu", degrees of freedom, at most 100; "ks_t" and "ks_normal", the largest
    differences of distribution functions.
  """
  from scipy import special, stats  # Takes long to import.

  tried = np.geomspace(*_NU)
  nu = tried[:, None]
  square = np.square(values)[None]
  scale = np.full((len(tried), 1), max(square.mean(), 1e-30))
  # The scale that is likeliest for each number of degrees of freedom.
  for _ in range(30):
    weights = (nu + 1) / (nu + square / scale)
    scale = (weights * square).mean(1, keepdims=True)
  likelihood = (
    special.gammaln((nu + 1) / 2)
    - special.gammaln(nu / 2)
    - np.log(nu * np.pi * scale) / 2
    - (nu + 1) / 2 * np.log1p(square / scale / nu)
  ).mean(1)
  best = int(np.argmax(likelihood))
  found = float(tried[best])
  ordered = np.sort(values)
  count = len(ordered)
  below, above = np.arange(count) / count, np.arange(1, count + 1) / count
  distance = lambda share: float(np.maximum(share - below, above - share).max())
  return {
    "nu": found,
    "ks_t": distance(stats.t.cdf(ordered, found, scale=scale[best, 0] ** 0.5)),
    "ks_normal": distance(special.ndtr(ordered / values.std())),
  }
