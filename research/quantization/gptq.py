"""Rounding of a kernel by GPTQ.

Shapes by axis letter: D rows, over which a product sums, F columns, G groups of
K rows.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from ops.quantized import (
  Format,
  QTensor,
  absmax,
  as_array,
  dequantize,
  quantize,
  specials,
)
from ops.quantized.quantize import Observer, nearest, unpack

_EXACT = jax.lax.Precision.HIGHEST


def fitting(form: Format, size: int) -> Format:
  """The format with the largest groups that divide an axis of `size`."""
  if isinstance(form.group, str):
    return form
  return dataclasses.replace(form, group=math.gcd(form.group, size))


@functools.partial(jax.jit, static_argnames=("form", "observer"))
def gptq(
  kernel: jax.Array,
  upper: jax.Array,
  form: Format,
  *,
  observer: Observer = absmax,
) -> QTensor:
  """Rounds row after row, and corrects the rows to come for the error.

  Frantar et al. 2022, algorithm 1: with H = X^T X + damp mean(diag) I and U the
  upper Cholesky factor of its inverse,

    e_i = (w_i - q_i) / U_ii,    w_j <- w_j - U_ij e_i  for j > i.

  Rows go in their order; a group's scales are those of its rows as corrected by
  the groups before, and so is the level that it has for itself. A second level
  of scales is that of the kernel as it was.

  Args:
    kernel: (D, F).
    upper: (D, D) float32, U: `factor` of what the kernel multiplies.
    form: symmetric; groups are made to fit D.
    observer: of magnitudes, for the scales.

  Returns:
    A `QTensor` of axis -2.

  Raises:
    ValueError: the format is not symmetric, or its levels are fitted.
  """
  form = fitting(form, kernel.shape[0])
  if not form.symmetric or form.fitted:
    raise ValueError(
      f"GPTQ of {form}: only symmetric formats, whose levels are not fitted"
    )
  size = kernel.shape[0]
  block = form.group if isinstance(form.group, int) else math.gcd(128, size)
  first = quantize(kernel, form, axis=-2, observer=observer)
  second = None
  if form.scale_format:
    second = first.scales.scales
    form = dataclasses.replace(form, scale_format=None, scale_dtype="float32")
  w = kernel.astype(jnp.float32)

  def next_block(w, start):
    part = jax.lax.dynamic_slice_in_dim(w, start, block)
    rows = jax.lax.dynamic_slice_in_dim(upper, start, block)
    own = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
    if isinstance(form.group, str):
      scales, special = as_array(first.scales), _special(first)
    else:
      scales = quantize(part, form, axis=-2, observer=observer).scales
      if second is not None:
        scales = dequantize(_second(first, scales))
      special = _special(quantize(part, form, axis=-2, scales=scales.T))
    rounded, errors = _round_block(part, own, scales.T, special, form)
    later = jnp.arange(size) >= start + block
    change = jnp.matmul(
      jnp.where(later[None], rows, 0.0).T, errors, precision=_EXACT
    )
    w = jax.lax.dynamic_update_slice_in_dim(w - change, rounded, start, 0)
    return w, scales

  starts = jnp.arange(0, size, block)
  w, scales = jax.lax.scan(next_block, w, starts)
  if isinstance(form.group, str):
    scales = scales[0]
  else:
    scales = jnp.moveaxis(scales[..., 0], 0, -1)
  found = quantize(w, form, axis=-2, scales=scales.T)
  if second is not None:
    kept = _second(first, scales)
    found = dataclasses.replace(found, scales=kept, format=first.format)
  return dataclasses.replace(found, dtype=kernel.dtype)


def _second(first: QTensor, scales: jax.Array) -> QTensor:
  """Scales (F, G) as those of a kernel are kept, with its second level."""
  own = first.scales
  return quantize(scales, own.format, scales=own.scales)


def _special(q: QTensor) -> jax.Array | None:
  """The special level of the only block of each column, (1, F) or (1, 1)."""
  if not q.format.specials:
    return None
  chosen = unpack(q.choices, q.format.choices, 1).T
  return jnp.asarray(q.format.specials, jnp.float32)[chosen]


def _round_block(part, upper, scales, special, form):
  """Rounds the rows of one block; the rounded rows, and their errors e."""
  later = jnp.arange(part.shape[0])

  def next_row(i, carry):
    part, errors = carry
    row = jax.lax.dynamic_slice_in_dim(part, i, 1)
    near = _near(form, row, scales, special)
    factors = jax.lax.dynamic_slice_in_dim(upper, i, 1)[0]
    error = (row - near) / factors[i]
    change = jnp.where(later > i, factors, 0.0)[:, None] * error
    part = jax.lax.dynamic_update_slice_in_dim(part - change, near, i, 0)
    return part, jax.lax.dynamic_update_slice_in_dim(errors, error, i, 0)

  start = part, jnp.zeros_like(part)
  return jax.lax.fori_loop(0, part.shape[0], next_row, start)


def _near(form, row, scales, special):
  """The nearest levels of a row (1, F), of its scales and special levels."""
  if special is None:
    one = _row_of(form)
    return dequantize(quantize(row, one, axis=-2, scales=scales))
  ratios = row / jnp.where(scales == 0, 1.0, scales)
  codes = specials.encode(form, ratios, special, nearest)
  return specials.decode(form, codes, special) * scales


def _row_of(form: Format) -> Format:
  """The format of a single row, whose scales are given."""
  return dataclasses.replace(form, group="row", packed=False)


@functools.partial(jax.jit, static_argnames="damp")
def factor(gram: jax.Array, *, damp: float = 0.01) -> jax.Array:
  """Upper Cholesky factor of the inverse of the damped products, float32.

  Args:
    gram: (D, D) float32, sum of x x^T.
    damp: share of the mean of its diagonal.

  Returns:
    (D, D), NaN where float32 does not reach.
  """
  diagonal = jnp.diagonal(gram)
  # A channel that is always zero has no weight in the error, so any will do.
  dead = jnp.where(diagonal == 0, jnp.maximum(jnp.mean(diagonal), 1e-30), 0.0)
  shift = dead + damp * jnp.mean(diagonal)
  lower = jnp.linalg.cholesky(gram + jnp.diag(shift))
  eye = jnp.eye(gram.shape[0], dtype=jnp.float32)
  inverse = jax.scipy.linalg.cho_solve((lower, True), eye)
  return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
