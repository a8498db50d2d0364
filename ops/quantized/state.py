"""`QState`: a recurrent state in few bits, which knows how it is rounded.

An op that steps a state reads it, computes in float32, and writes the new one
the way the old one is kept: a step a token, a rounding a step. What the op
returns beside the state comes from the state before it is rounded.

Rounding to the nearest level loses updates of less than half a step, again and
again where the state decays slowly. Two ways keep them:

- stochastic rounding keeps them on average;
- error feedback keeps what rounding left (`residual`) and adds it before the
  next rounding. This is a state of b + r bits: within a block its values are a
  grid of 2^r times as many steps, as a format of b + r bits has. At equal bytes
  it gains nothing over such a format, and where bytes do not count a wider
  format is simpler; it is here to be compared.
"""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from ops.quantized.formats import Format
from ops.quantized.quantize import dequantize, quantize
from ops.quantized.tensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QState:
  """A state (..., B, *S) of B rows; blocks lie along the last axis.

  Leading axes are stacked layers: indexing or a scan over them sees an array a
  leaf.

  Attributes:
    tensor: The state without the residual. Its scales are of each row, or of
      all where they are static: then their axis B is 1.
    residual: What rounding left: codes of `residual_format`, packed, of steps
      that fill the steps of `tensor`; or None.
    noise: (..., B) uint32, the generator's state for stochastic rounding, or
      None for rounding to nearest. It moves by one with every rounding and is
      the same in all rows, so what a row draws depends on how often it was
      rounded, and on no other row.
    static: Whether the scales stay.
    residual_format: Of `residual`, symmetric and an integer grid.
  """

  tensor: QTensor
  residual: jax.Array | None = None
  noise: jax.Array | None = None
  static: bool = dataclasses.field(default=False, metadata={"static": True})
  residual_format: Format | None = dataclasses.field(
    default=None, metadata={"static": True}
  )

  @property
  def shape(self) -> tuple[int, ...]:
    """(..., B, *S)."""
    return self.tensor.shape

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return self.tensor.ndim

  @property
  def dtype(self) -> jnp.dtype:
    """Of the array that it stands for."""
    return self.tensor.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of all that is kept."""
    return sum(
      math.prod(leaf.shape) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(self)
    )

  def read(self) -> jax.Array:
    """The state (..., B, *S) that this stands for, in its dtype."""
    whole = dequantize(self.tensor, dtype=jnp.float32)
    if self.residual is not None:
      whole = whole + dequantize(self._residual(), dtype=jnp.float32)
    return whole.astype(self.dtype)

  def write(self, x: jax.Array) -> Self:
    """Rounds a state (B, *S) as this one, which has no layers, is rounded."""
    tensor, noise, draws = self.tensor, self.noise, None
    if noise is not None:
      noise = _mixed(noise + np.uint32(_GOLDEN))
      draws = _uniform(noise, x.shape)
    if self.static:
      new = quantize(x, tensor.format, scales=tensor.scales, noise=draws)
    else:
      new = _by_rows(x, tensor.format, draws)
    new = dataclasses.replace(new, dtype=tensor.dtype)
    found = dataclasses.replace(self, tensor=new, noise=noise)
    if self.residual is None:
      return found
    left = x.astype(jnp.float32) - dequantize(new, dtype=jnp.float32)
    scales = found._residual().scales
    left = quantize(left, _grid(self.residual_format, new), scales=scales)
    return dataclasses.replace(found, residual=left.values)

  def _residual(self) -> QTensor:
    """The residual, whose largest level is half a step of the tensor's."""
    form = _grid(self.residual_format, self.tensor)
    share = np.float32(0.5 / np.abs(form.levels).max())
    return dataclasses.replace(
      self.tensor,
      values=self.residual,
      scales=self.tensor.scales * share,
      format=form,
    )


def zeros(
  shape: tuple[int, ...],
  format: Format,
  dtype: jnp.dtype,
  *,
  scales: jax.Array | None = None,
  residual: Format | None = None,
  seed: int | None = None,
) -> QState:
  """A state of zeros.

  Args:
    shape: (L, B, *S), L layers.
    format: Of the values.
    dtype: Of the array that it stands for.
    scales: Static ones, (L, ..., G): axes between are counted from the right.
    residual: Format of what rounding leaves; None keeps none of it.
    seed: Of stochastic rounding, which None does without.

  Raises:
    ValueError: Groups or scales do not fit, or a residual does not go with the
      rest.
  """
  if residual is not None and (seed is not None or not _plain(format)):
    raise ValueError(
      "a residual goes with rounding to nearest, and with a symmetric format"
      " without a second level"
    )
  if residual is not None and not (_plain(residual) and residual.is_integer):
    raise ValueError(f"a residual cannot be kept in {residual}")
  # XLA would else round all these zeros while it compiles, for a minute.
  empty = jax.lax.optimization_barrier(jnp.zeros(shape, dtype))
  if scales is None:
    tensor = jax.vmap(lambda x: _by_rows(x, format, None))(empty)
  else:
    between = (1,) * (len(shape) - scales.ndim)
    scales = scales.reshape(scales.shape[:1] + between + scales.shape[1:])
    run = lambda x, s: quantize(x, format, scales=s)
    tensor = jax.vmap(run)(empty, scales)
  noise = None
  if seed is not None:
    keys = _mixed(jnp.arange(shape[0], dtype=jnp.uint32) + np.uint32(seed))
    noise = jnp.broadcast_to(keys[:, None], shape[:2])
  codes = None
  if residual is not None:
    form = _grid(residual, tensor)
    codes = quantize(empty, form, scales=tensor.scales).values
  return QState(
    tensor=tensor,
    residual=codes,
    noise=noise,
    static=scales is not None,
    residual_format=residual,
  )


def like(
  x: jax.Array, before: "jax.Array | QState | None"
) -> "jax.Array | QState":
  """A new state (B, *S), kept the way of the one before it."""
  if before is None:
    return x
  if isinstance(before, QState):
    return before.write(x)
  return x.astype(before.dtype)


def _by_rows(x, format, draws):
  """The QTensor of rows (B, *S) that share no scale."""
  run = lambda x, noise: quantize(x, format, noise=noise)
  return jax.vmap(run, in_axes=(0, None if draws is None else 0))(x, draws)


def _plain(format: Format) -> bool:
  return format.symmetric and format.scale_format is None


def _grid(residual: Format, tensor: QTensor) -> Format:
  """The format of a residual, in the blocks of its tensor."""
  return dataclasses.replace(
    residual,
    group=tensor.format.group,
    scale_dtype=tensor.format.scale_dtype,
  )


# The odd number next to 2^32 over the golden ratio: its multiples are spread.
_GOLDEN = 0x9E3779B9


def _mixed(x: jax.Array) -> jax.Array:
  """A permutation of uint32 that looks random.

  `lowbias32` of https://github.com/skeeto/hash-prospector (public domain).
  """
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _uniform(noise: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Numbers in [0, 1) of `shape` (B, *S), from a key (B,) and their place."""
  places = jnp.arange(math.prod(shape[1:]), dtype=jnp.uint32)
  places = (places * np.uint32(_GOLDEN)).reshape(1, *shape[1:])
  keys = noise.reshape(-1, *(1,) * (len(shape) - 1))
  bits = _mixed(jnp.broadcast_to(places, shape) ^ jnp.broadcast_to(keys, shape))
  return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)
