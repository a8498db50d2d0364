"""The specification of `quantize` and `dequantize`."""

import jax.numpy as jnp
import numpy as np

from ops.quantized import formats


def quantize_reference(
  x: np.ndarray, format: str | formats.Format, *, axis: int = -1
) -> tuple[np.ndarray, np.ndarray]:
  """The nearest levels of a format without a second level, in float64.

  Args:
    x: (..., S, ...), S along `axis`.
    format: As in `quantize`.
    axis: As in `quantize`.

  Returns:
    What comes back of x, and the scale of each of its values, both of x's
    shape.
  """
  form = formats.get(format)
  moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
  values, scales = np.zeros(moved.shape), np.zeros(moved.shape)
  if form.group == "tensor":
    values[...], scales[...] = _block(form, moved)
  else:
    group = moved.shape[-1] if form.group == "row" else form.group
    for row in np.ndindex(*moved.shape[:-1]):
      for start in range(0, moved.shape[-1], group):
        own = *row, slice(start, start + group)
        values[own], scales[own] = _block(form, moved[own])
  return np.moveaxis(values, -1, axis), np.moveaxis(scales, -1, axis)


def _block(form, block):
  points, zero = form.levels, 0.0
  if form.symmetric:
    scale = np.abs(block).max() / np.abs(points).max()
  else:
    low, high = max(-block.min(), 0.0), max(block.max(), 0.0)
    scale = (low + high) / (points[-1] - points[0])
  scale = float(np.asarray(scale).astype(jnp.dtype(form.scale_dtype)))
  if scale == 0:
    return np.zeros(block.shape), scale
  if not form.symmetric:
    zero = np.clip(np.round(points[0] + low / scale), points[0], points[-1])
  distances = np.abs((block / scale + zero)[..., None] - points)
  return (points[distances.argmin(-1)] - zero) * scale, scale
