"""`quantize` and `dequantize`, the same code for every row of the table."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch
from ops.quantized import fitting, formats, specials
from ops.quantized.formats import Format
from ops.quantized.tensor import QTensor

IMPLEMENTATIONS = dispatch.XLA_ONLY

# From magnitudes and the axes of a block to the largest that has a level.
Observer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def absmax(magnitudes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """The observer that clips nothing: each block's maximum.

  Args:
    magnitudes: (..., S, ...), not negative.
    axes: of a block.

  Returns:
    The same shape with 1 for each of `axes`.
  """
  return jnp.max(magnitudes, axis=axes, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Percentile:
  """The observer that clips outliers: a percentile of each block's magnitudes.

  Attributes:
    percent: 0 to 100, interpolated linearly between magnitudes.
  """

  percent: float

  def __post_init__(self):
    """Checks the bounds."""
    if not 0 < self.percent <= 100:
      raise ValueError(f"Percentile: {self.percent} is not in (0, 100]")

  def __call__(self, magnitudes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Maps (...) to the same shape with 1 for each of `axes`."""
    return jnp.quantile(magnitudes, self.percent / 100, axes, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Searched:
  """The observer that clips what costs a block more than it gains.

  Of a few shares of its largest magnitude each block takes the one that leaves
  the least squared error, with its scale as it is kept, if that has no second
  level. Twice the magnitude is among them, for scales that are powers of two:
  the rule of MX clips some blocks itself. Where blocks choose a level, errors
  are those of scales that are not rounded yet, and the choice alone is made
  anew with kept ones. Where a codebook is fitted, errors are those of the
  levels that the fit starts from, and scales stay when it ends, so that others
  may leave less.

  Attributes:
    shares: that are tried, each in (0, 2].
  """

  shares: tuple[float, ...] = (*(1 - i / 20 for i in range(11)), 2.0)

  def __post_init__(self):
    """Checks the bounds."""
    if not self.shares or not all(0 < share <= 2 for share in self.shares):
      raise ValueError(f"Searched: {self.shares} are not in (0, 2]")

  def __call__(self, magnitudes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Maps (...) to the same shape with 1 for each of `axes`."""
    return absmax(magnitudes, axes)


def quantize(
  x: jax.Array,
  format: str | Format,
  *,
  axis: int = -1,
  observer: Observer = absmax,
  scales: jax.Array | None = None,
  noise: jax.Array | None = None,
  implementation: str | None = None,
) -> QTensor:
  """Keeps an array in few bits: each value as its nearest level.

    symmetric    s = m / max(levels)                c = nearest(x / s)
    asymmetric   s = (high + low) / (levels - 1)    c = nearest(x / s + z)

  with m the observer's largest |x| of a block, high and low those of max(x, 0)
  and max(-x, 0), and z = round(min(levels) + low / s). Values beyond the levels
  get the outermost; halves go to the even code of a grid and to the lower level
  of a codebook. A block of zeros is exact. A value that is not finite comes
  back as such. Where a format has special levels, each block has the one that
  leaves the least squared error.

  Args:
    x: (..., S, ...), any float dtype; computed in float32.
    format: A `Format`, or what `formats.get` takes: "int8", "int4:64".
    axis: That a product sums over, of size S: -1 for activations and rows of a
      table, -2 for kernels (in, out).
    observer: `absmax`, `Percentile(99.9)`, `Searched()`, or a function alike.
    scales: Given in place of the observer's, for a symmetric format, such as
      from calibration: positive, (..., G, ...) or broadcasting to it.
    noise: (..., S, ...) as x, uniform in [0, 1): rounds stochastically, to one
      of the two levels around a value, each as likely as the value is near to
      it, so that rounding is unbiased. None rounds to nearest.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    A `QTensor`. Stacked layers are quantized by `jax.vmap`, which gives each a
    scale of its own also per tensor. There are no gradients; `fake_quantize`
    has straight-through ones.

  Raises:
    ValueError: x is not of a float dtype, there is no such format, its groups
      do not divide S, or it has special levels or a codebook to be fitted and
      is to be rounded stochastically.
  """
  dispatch.resolve("quantize", IMPLEMENTATIONS, implementation)
  form = formats.get(format)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"quantize: x is {x.dtype}, not of a float dtype")
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"quantize: x {x.shape} has no axis {axis}")
  axis = axis - x.ndim if axis >= 0 else axis
  size = x.shape[axis]
  count = _count(form, size)
  rows = jnp.moveaxis(jax.lax.stop_gradient(x), axis, -1)
  blocks = into_blocks(rows.astype(jnp.float32), -1, count)
  if (form.specials or form.fitted) and noise is not None:
    raise ValueError(f"quantize: {form} cannot be rounded stochastically")
  zeros = choices = book = None
  if scales is not None:
    scales = _given(form, scales, x.shape, axis, count)
  else:
    scales, zeros = _observed(form, observer, blocks)
  scales = _kept_scales(form, scales)
  shared = lambda v: jnp.expand_dims(v.astype(jnp.float32), -1)
  steps = shared(_plain(scales))
  # A scale of zero belongs to zeros, or to what is too small for its dtype.
  ratios = blocks / jnp.where(steps == 0, 1.0, steps)
  if zeros is not None:
    ratios = ratios + shared(zeros)
  if form.specials:
    # With scales as they are kept another level may be the best.
    choices = jnp.argmin(_special_errors(form, blocks, [steps]), 0)[..., 0]
    special = jnp.asarray(form.specials, jnp.float32)[choices][..., None]
    codes = specials.encode(form, ratios, special, nearest)
    codes, choices = codes.reshape(rows.shape), pack(choices, form.choices)
  elif form.fitted:
    book = fitting.FITS[form.fitted](form, blocks, ratios, steps)
    codes = fitting.nearest(book, ratios).astype(form.dtype)
    codes = codes.reshape(rows.shape)
    book = book.reshape((1,) * (rows.ndim - 1) + book.shape)
  elif noise is None:
    codes = nearest(form, ratios).reshape(rows.shape)
  else:
    noise = jnp.moveaxis(noise, axis, -1)
    codes = _stochastic(form, ratios.reshape(rows.shape), noise)
  return QTensor(
    values=pack(codes, form),
    scales=scales,
    zeros=zeros,
    format=form,
    axis=axis,
    length=size,
    dtype=jnp.dtype(x.dtype),
    choices=choices,
    book=book,
  )


def _kept_scales(form, scales):
  """Scales as a QTensor keeps them: in a format of their own, or an array."""
  if form.scale_format:
    return quantize(scales, form.scale_format)
  if form.scale_dtype == "float8_e8m0fnu":
    return _powers_of_two(scales, np.abs(form.levels).max())
  return scales.astype(form.scale_dtype)


def _powers_of_two(scales, top):
  """2^(floor(log2(scales top)) - floor(log2(top))) in float8_e8m0fnu."""
  largest = scales.astype(jnp.float32) * np.float32(top)
  largest = jax.lax.bitcast_convert_type(largest, jnp.int32)
  # The exponents of a float32 and of such a scale have the same bias, and the
  # last one stands for what is not finite in both.
  exponent = largest >> 23
  code = jnp.where(
    exponent == 255, 255, jnp.maximum(exponent - math.floor(math.log2(top)), 0)
  )
  return jax.lax.bitcast_convert_type(
    code.astype(jnp.uint8), jnp.float8_e8m0fnu
  )


def _axes(form, blocks):
  """The axes of blocks (..., G, K) that share a scale."""
  return tuple(range(blocks.ndim)) if form.group == "tensor" else (-1,)


def _observed(form, observer, blocks):
  """Scales and zero points (..., G) of blocks (..., G, K)."""
  axes, shares = _axes(form, blocks), getattr(observer, "shares", (1.0,))

  def clipped(share):
    # Scales and zero points at a share of what is observed, and errors of them.
    own = lambda magnitudes, axes: observer(magnitudes, axes) * share
    if form.specials:
      largest = own(jnp.abs(blocks), axes)
      each = [largest / top for top in specials.tops(form)]
      errors = _special_errors(form, blocks, each)
      best = jnp.argmin(errors, 0)[None]
      pick = lambda some: jnp.take_along_axis(some, best, 0)[0]
      return (pick(jnp.stack(each)), None), pick(errors)
    scales, zeros = _observe(form, own, blocks, axes)
    if len(shares) == 1:
      return (scales, zeros), None
    steps = scales if form.scale_format else _plain(_kept_scales(form, scales))
    steps = steps.astype(jnp.float32)
    error = blocks - _back(form, blocks, steps, zeros)
    return (scales, zeros), jnp.sum(jnp.square(error), axes, keepdims=True)

  if len(shares) == 1:
    found, _ = clipped(1.0)
  else:
    found, errors = jax.lax.map(clipped, jnp.asarray(shares, jnp.float32))
    best = jnp.argmin(errors, 0)[None]
    pick = lambda some: jnp.take_along_axis(some, best, 0)[0]
    found = jax.tree.map(pick, found)
  return jax.tree.map(lambda part: jnp.squeeze(part, -1), found)


def _back(form, blocks, steps, zeros):
  """What comes back of blocks with scales and zero points."""
  ratios = blocks / jnp.where(steps == 0, 1.0, steps)
  shift = 0.0 if zeros is None else zeros.astype(jnp.float32)
  codes = nearest(form, ratios + shift)
  if form.codebook is not None:
    codes = jnp.asarray(form.codebook, jnp.float32)[codes]
  return (codes.astype(jnp.float32) - shift) * steps


def _special_errors(form, blocks, each):
  """Squared errors (N, ..., G, 1) with each special level, and its scales."""
  each = each * (len(form.specials) // len(each))
  return specials.errors(form, blocks, each, _axes(form, blocks), nearest)


def dequantize(
  q: QTensor,
  *,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Returns the array that a QTensor stands for: (level(c) - z) s.

  Args:
    q: Of any shape.
    dtype: Of the result, by default `q.dtype`; computed in float32.
    implementation: `"xla"`, or None for the best that runs here.
  """
  dispatch.resolve("dequantize", IMPLEMENTATIONS, implementation)
  shared = lambda v: jnp.expand_dims(v.astype(jnp.float32), -1)
  rows = levels(q)
  blocks = into_blocks(rows.astype(jnp.float32), -1, q.num_blocks)
  if q.zeros is not None:
    blocks = blocks - shared(q.zeros)
  values = (blocks * shared(_plain(q.scales))).reshape(rows.shape)
  values = values.astype(q.dtype if dtype is None else dtype)
  return jnp.moveaxis(values, -1, q.axis)


def levels(q: QTensor) -> jax.Array:
  """Returns the levels as they lie in memory, (..., S).

  In the format's dtype where codes are their own levels, else in float32.
  """
  form = q.format
  codes = unpack(q.values, form, q.length)
  if form.codebook is None:
    return codes
  if form.fitted:
    return fitting.of_codes(q.book, codes)
  if not form.specials:
    return jnp.asarray(form.codebook, jnp.float32)[codes]
  choices = unpack(q.choices, form.choices, q.num_blocks)
  special = jnp.asarray(form.specials, jnp.float32)[choices][..., None]
  blocks = into_blocks(codes, -1, q.num_blocks)
  return specials.decode(form, blocks, special).reshape(codes.shape)


def into_blocks(x: jax.Array, axis: int, count: int) -> jax.Array:
  """Splits an axis, counted from the end.

  Args:
    x: (..., S, ...).
    axis: Negative, that of S.
    count: Of blocks.

  Returns:
    (..., count, S / count, ...).
  """
  at = x.ndim + axis
  size = x.shape[at] // count
  return x.reshape(*x.shape[:at], count, size, *x.shape[at + 1 :])


def pack(codes: jax.Array, form: Format) -> jax.Array:
  """Packs neighbours into bytes, where the format asks for it.

  Args:
    codes: (..., S) in the format's dtype.
    form: The format.

  Returns:
    (..., form.packed_size(S)) uint8, or the codes as they are.
  """
  count, size = form.pack
  if count == 1:
    return codes
  padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)]
  codes = jnp.pad(codes, padding).astype(jnp.uint8) & (2**form.bits - 1)
  blocks = into_blocks(codes, -1, codes.shape[-1] // count)
  found = [
    _joined((blocks[..., i], form.bits * i - 8 * j) for i in range(count))
    for j in range(size)
  ]
  return jnp.stack(found, -1).reshape(*codes.shape[:-1], -1)


def unpack(values: jax.Array, form: Format, size: int) -> jax.Array:
  """The inverse of `pack`.

  Args:
    values: (..., P), P = form.packed_size(S).
    form: The format.
    size: S.

  Returns:
    (..., S) in the format's dtype.
  """
  count, elements = form.pack
  if count == 1:
    return values
  blocks = into_blocks(values, -1, values.shape[-1] // elements)
  codes = [
    _joined((blocks[..., j], 8 * j - form.bits * i) for j in range(elements))
    for i in range(count)
  ]
  codes = jnp.stack(codes, -1) & (2**form.bits - 1)
  codes = codes.reshape(*values.shape[:-1], -1)[..., :size].astype(form.dtype)
  if not jnp.issubdtype(form.dtype, jnp.signedinteger):
    return codes
  sign = 2 ** (form.bits - 1)
  return (codes ^ sign) - sign


def _joined(parts: Iterable[tuple[jax.Array, int]]) -> jax.Array:
  """The bits of bytes that are shifted to the left, each by its number."""
  shifted = [
    part << by if by >= 0 else part >> -by for part, by in parts if abs(by) < 8
  ]
  return functools.reduce(operator.or_, shifted)


def _plain(scales: jax.Array | QTensor) -> jax.Array:
  """Scales, those of a second level dequantized."""
  return dequantize(scales) if isinstance(scales, QTensor) else scales


def _count(form: Format, size: int) -> int:
  """Blocks along an axis of `size`."""
  if isinstance(form.group, str):
    return 1
  if size % form.group:
    raise ValueError(
      f"quantize: groups of {form.group} do not divide an axis of {size}; give"
      " a group that does, or row"
    )
  return size // form.group


def _observe(form, observer, blocks, axes):
  """Scales and zero points of all blocks, the axes of a block kept."""
  points = form.levels
  if form.symmetric:
    return observer(jnp.abs(blocks), axes) / np.abs(points).max(), None
  low, high = (
    observer(jnp.maximum(side, 0), axes) for side in (-blocks, blocks)
  )
  scales = (low + high) / (points[-1] - points[0])
  zeros = points[0] + low / jnp.where(scales == 0, 1.0, scales)
  return scales, jnp.clip(jnp.round(zeros), *points[[0, -1]]).astype(form.dtype)


def _given(form, scales, shape, axis, count):
  """Scales of the caller, one for each block along `axis`."""
  wanted = list(shape)
  wanted[axis] = count
  if (
    not form.symmetric
    or len(scales.shape) != len(wanted)
    or any(one not in (1, size) for one, size in zip(scales.shape, wanted))
  ):
    raise ValueError(
      f"quantize: scales {scales.shape} must be for a symmetric format and have"
      f" the shape {tuple(wanted)}, or 1 in its place"
    )
  whole = list(scales.shape)
  whole[axis] = count
  return jnp.moveaxis(jnp.broadcast_to(scales, whole), axis, -1)


def nearest(form: Format, ratios: jax.Array) -> jax.Array:
  """Codes of the nearest of the levels that all blocks have.

  Args:
    form: of the codes.
    ratios: (...), values in steps of a scale.

  Returns:
    (...) in the format's dtype.
  """
  points = form.levels
  if form.codebook is not None:
    middles = jnp.asarray((points[1:] + points[:-1]) / 2, jnp.float32)
    codes = jnp.searchsorted(middles, ratios, method="compare_all")
    return codes.astype(form.dtype)
  if form.is_integer:
    ratios = jnp.round(ratios)
  return jnp.clip(ratios, points[0], points[-1]).astype(form.dtype)


def _stochastic(form, ratios, noise):
  """Codes of one of the two levels around each ratio, by chance."""
  points = form.levels
  ratios = jnp.clip(ratios, points[0], points[-1])
  if form.is_integer:
    return jnp.floor(ratios + noise).clip(max=points[-1]).astype(form.dtype)
  if form.codebook is not None:
    levels = jnp.asarray(points, jnp.float32)
    low = jnp.searchsorted(levels[1:-1], ratios, side="right")
    share = (ratios - levels[low]) / (levels[low + 1] - levels[low])
    return (low + (noise < share)).astype(form.dtype)
  # The codes of a float type rise with the magnitude.
  near = ratios.astype(form.dtype)
  bits = jax.lax.bitcast_convert_type(near, jnp.uint8)
  size = lambda v: jnp.abs(v.astype(jnp.float32))
  step = jnp.where(size(near) <= jnp.abs(ratios), 1, -1).astype(jnp.uint8)
  other = jax.lax.bitcast_convert_type(bits + step, near.dtype)
  gap = size(other) - size(near)
  share = (jnp.abs(ratios) - size(near)) / jnp.where(gap == 0, 1.0, gap)
  return jnp.where(noise < share, other, near)
