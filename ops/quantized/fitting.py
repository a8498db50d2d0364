"""Codebooks that a tensor fits to itself.

Shapes by axis letter: G blocks of K values, C levels.
"""

import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ops.quantized.formats import Format

# Values of a tensor that are looked at, spread evenly over it.
_LOOKED_AT = 1 << 20
# Rounds of Lloyd's algorithm.
_ROUNDS = 300
# Degrees of freedom that are tried (first, last, how many), values that they
# are judged by, and rounds in which the likeliest scale of each is found.
_NU = 1.5, 100.0, 64
_JUDGED = 1 << 14
_SCALED = 30
# Halvings of an interval that holds a quantile.
_HALVINGS = 60


def nearest(book: jax.Array, ratios: jax.Array) -> jax.Array:
  """Indices of the nearest of ascending levels (C,); the lower of two."""
  middles = (book[1:] + book[:-1]) / 2
  return jnp.searchsorted(middles, ratios, method="compare_all")


def of_codes(book: jax.Array, codes: jax.Array) -> jax.Array:
  """Levels of codes (..., S) by codebooks (..., C), 1 along shared axes."""
  if all(size == 1 for size in book.shape[:-1]):
    return book.reshape(-1)[codes]
  book = jnp.broadcast_to(book, (*codes.shape[:-1], book.shape[-1]))
  return jnp.take_along_axis(book, codes.astype(jnp.int32), -1)


def lloyd_max(
  form: Format, blocks: jax.Array, ratios: jax.Array, steps: jax.Array
) -> jax.Array:
  """The codebook of the least squared error, by Lloyd's algorithm.

  Each level is the mean of the values that are nearest to it, weighted by the
  squares of their scales.

  Args:
    form: whose codebook it begins with.
    blocks: (..., G, K) values.
    ratios: (..., G, K), the same in steps of their scales.
    steps: scales (..., G, 1).

  Returns:
    Levels (C,) float32, ascending.
  """
  weights = jnp.broadcast_to(jnp.square(steps), blocks.shape)
  values, weights = (_some(v, _LOOKED_AT) for v in (ratios, weights))
  order = jnp.argsort(values)
  values, weights = values[order], weights[order]
  # The largest weight is one, so that sums of small tensors are no denormals.
  weights = weights / jnp.maximum(jnp.max(weights), 1e-30)
  sums = [
    jnp.concatenate([jnp.zeros(1), jnp.cumsum(v)])
    for v in (weights, weights * values)
  ]

  def improve(_, book):
    middles = (book[1:] + book[:-1]) / 2
    ends = jnp.searchsorted(values, middles, side="right")
    ends = jnp.concatenate([jnp.zeros(1, int), ends, jnp.full(1, values.size)])
    weight, whole = (s[ends[1:]] - s[ends[:-1]] for s in sums)
    # A level that no value is nearest to stays where it is.
    found = jnp.where(
      weight > 0, whole / jnp.where(weight > 0, weight, 1), book
    )
    return jnp.sort(found)

  start = jnp.asarray(form.codebook, jnp.float32)
  return jax.lax.fori_loop(0, _ROUNDS, improve, start)


def student_t(
  form: Format, blocks: jax.Array, ratios: jax.Array, steps: jax.Array
) -> jax.Array:
  """Quantiles of the likeliest t distribution of mean zero, as in SF4.

  Args:
    form: whose bits count.
    blocks: (..., G, K) values.
    ratios: (..., G, K), not used.
    steps: (..., G, 1), not used.

  Returns:
    Levels (C,) float32, ascending.
  """
  del ratios, steps
  nu = degrees_of_freedom(_some(blocks, _JUDGED))
  return quantiles(nu, form.bits)


def degrees_of_freedom(values: jax.Array) -> jax.Array:
  """Those of the likeliest t distribution of mean zero of values (N,), ()."""
  tried = np.geomspace(*_NU)
  nu = jnp.asarray(tried, jnp.float32)[:, None]
  square = jnp.square(values)[None]
  square = square / jnp.maximum(jnp.mean(square), 1e-30)

  def rescale(_, scale):
    weights = (nu + 1) / (nu + square / scale)
    return jnp.maximum(jnp.mean(weights * square, 1, keepdims=True), 1e-6)

  scale = jax.lax.fori_loop(0, _SCALED, rescale, jnp.ones_like(nu))
  spread = jnp.log1p(square / scale / nu)
  likelihood = (
    jax.lax.lgamma((nu + 1) / 2)
    - jax.lax.lgamma(nu / 2)
    - jnp.log(nu * np.pi * scale) / 2
    - (nu + 1) / 2 * jnp.mean(spread, 1, keepdims=True)
  )[:, 0]
  return nu[jnp.argmax(likelihood), 0]


def quantiles(nu: float | jax.Array, bits: int) -> jax.Array:
  """The SF codebook of a t distribution: quantiles over the largest.

  Args:
    nu: () degrees of freedom.
    bits: of a code.

  Returns:
    (2^bits,) float32, ascending, with zero and both signs of one end.
  """
  half, delta = 2 ** (bits - 1), (1 / 32 + 1 / 30) / 2
  low = np.linspace(delta, 0.5, half)
  high = np.linspace(0.5, 1 - delta, half + 1)[1:]
  below = np.concatenate([low, 1 - high])
  below = jnp.asarray(below, jnp.float32)
  nu = jnp.asarray(nu, jnp.float32)

  def halve(_, ends):
    # The share below -x falls as x rises.
    near, far = ends
    x = (near + far) / 2
    share = jax.scipy.special.betainc(nu / 2, 0.5, nu / (nu + x * x)) / 2
    return jnp.where(share > below, x, near), jnp.where(share > below, far, x)

  ends = jnp.zeros_like(below), jnp.full_like(below, 1e3)
  near, far = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
  sizes = jnp.where(below == 0.5, 0.0, (near + far) / 2)
  found = jnp.concatenate([-sizes[:half], sizes[half:]])
  return found / jnp.max(jnp.abs(found))


def _some(values, most):
  """At most so many of the values, spread evenly, (N,)."""
  flat = values.reshape(-1)
  return flat[:: -(-flat.size // most)]


# (form, blocks, ratios, steps) -> levels
Fit = Callable[[Format, jax.Array, jax.Array, jax.Array], jax.Array]
FITS: Mapping[str, Fit] = types.MappingProxyType(
  {"lloyd_max": lloyd_max, "student_t": student_t}
)
