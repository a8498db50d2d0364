"""The causal convolution as TPU kernels: one pass over memory each way.

A block of tokens is read with the few tokens before it (and, backward, after
it), so that blocks are independent of each other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ops import dispatch
from ops.causal_conv1d import xla

# Tokens read around a block: a whole tile of bfloat16.
_HALO = 16
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
  """Tokens and channels of a block.

  Attributes:
    length: A multiple of 128.
    channels: A multiple of 128.
  """

  length: int
  channels: int


def supports(
  x: Any = None, weight: Any = None, *arrays: Any, **options: Any
) -> str | None:
  """None where the kernels run, else the reason; see `ops/dispatch.py`."""
  del arrays, options
  reason = dispatch.needs_tpu()
  if reason is not None or x is None:
    return reason
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f"needs x in bfloat16 or float32, this is {x.dtype}"
  if not 2 <= weight.shape[1] <= _HALO + 1:
    return f"needs 2 to {_HALO + 1} taps, these are {weight.shape[1]}"
  return None


def _config(length: int, channels: int) -> Config:
  fit = lambda size, most: min(most, pl.cdiv(size, _LANES) * _LANES)
  return Config(length=fit(length, 256), channels=fit(channels, 512))


def _inputs_around(x_refs, state_ref, row_ref, block, length):
  """Writes the inputs before, in, and after the block to scratch, in order.

  What lies beyond the sequence is undefined, so it is set to zero.
  """
  before_ref, own_ref, *after_refs = x_refs
  taps, size = state_ref.shape[1], own_ref.shape[1]
  row_ref[:_HALO] = before_ref[0].astype(jnp.float32)

  @pl.when(block == 0)
  def _():
    row_ref[pl.ds(_HALO - taps, taps)] = state_ref[0].astype(jnp.float32)

  for ref, at in zip([own_ref, *after_refs], [_HALO, _HALO + size]):
    values = ref[0].astype(jnp.float32)
    slots = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    slots = slots + (block * size + at - _HALO)
    row_ref[pl.ds(at, values.shape[0])] = jnp.where(slots < length, values, 0.0)


def _column(reach_ref):
  """The block's reach, from lanes to sublanes: (tokens, 1)."""
  wide = jnp.broadcast_to(reach_ref[0], (_LANES, reach_ref.shape[2]))
  return jnp.transpose(wide)[:, :1]


def _seen(values, reach, back):
  if reach is None:
    return values
  return jnp.where(reach >= back, values, 0.0)


def _preactivation(row_ref, weight_ref, bias_ref, reach, rows):
  last = weight_ref.shape[0] - 1
  total = jnp.broadcast_to(bias_ref[...], (rows, bias_ref.shape[1]))
  for back in range(last + 1):
    shifted = row_ref[pl.ds(_HALO - back, rows)]
    tap = weight_ref[pl.ds(last - back, 1)]
    total = total + _seen(shifted, reach, back) * tap
  return total


def _forward_kernel(*refs, silu, length, packed):
  before, own, state, weight, bias, *reaches, y, row = refs
  block = pl.program_id(2)
  _inputs_around([before, own], state, row, block, length)
  reach = _column(reaches[0]) if packed else None
  pre = _preactivation(row, weight, bias, reach, own.shape[1])
  out = pre * jax.nn.sigmoid(pre) if silu else pre
  y[0] = _seen(out, reach, 0).astype(y.dtype)


def _backward_kernel(*refs, silu, length, packed):
  before, own, after, dy, dy_after, state, weight, bias, *refs = refs
  *reaches, dx, dweight, dbias, row, drow = refs
  block, size, last = pl.program_id(2), own.shape[1], weight.shape[0] - 1
  rows = size + _HALO
  _inputs_around([before, own, after], state, row, block, length)
  reach = None
  if packed:
    own_reach, next_reach = map(_column, reaches)
    reach = jnp.concatenate([own_reach, next_reach[:_HALO]])
  drow[:size] = dy[0].astype(jnp.float32)
  drow[size:] = dy_after[0].astype(jnp.float32)
  dpre = drow[...]
  if silu:
    pre = _preactivation(row, weight, bias, reach, rows)
    gate = jax.nn.sigmoid(pre)
    dpre = dpre * (gate * (1 + pre * (1 - gate)))
  slots = jax.lax.broadcasted_iota(jnp.int32, dpre.shape, 0) + block * size
  dpre = _seen(jnp.where(slots < length, dpre, 0.0), reach, 0)

  @pl.when((pl.program_id(1) == 0) & (block == 0))
  def _():
    dweight[...] = jnp.zeros_like(dweight)
    dbias[...] = jnp.zeros_like(dbias)

  dbias[...] += jnp.sum(dpre[:size], axis=0, keepdims=True)
  total = jnp.zeros((size, own.shape[2]), jnp.float32)
  for back in range(last + 1):
    tap = pl.ds(last - back, 1)
    seen = _seen(dpre, reach, back)
    shifted = row[pl.ds(_HALO - back, size)]
    dweight[tap] += jnp.sum(shifted * seen[:size], axis=0, keepdims=True)
    drow[...] = seen
    total = total + drow[pl.ds(back, size)] * weight[tap]
  dx[0] = total.astype(dx.dtype)


def _specs(config: Config, length: int):
  """Blocks of the grid (channels, batch, length)."""
  size, channels = config.length, config.channels
  per_block, halos = size // _HALO, pl.cdiv(length, _HALO)
  lanes = pl.cdiv(length, _LANES)
  tokens = lambda rows, at: pl.BlockSpec(
    (1, rows, channels), lambda d, b, l: (b, at(l), d)
  )
  ids = lambda columns, at: pl.BlockSpec(
    (1, 1, columns), lambda d, b, l: (b, 0, at(l))
  )
  fixed = lambda rows: pl.BlockSpec((rows, channels), lambda d, b, l: (0, d))
  next_halo = lambda l: jnp.minimum((l + 1) * per_block, halos - 1)
  next_lanes = lambda l: jnp.minimum((l + 1) * (size // _LANES), lanes - 1)
  return {
    "own": tokens(size, lambda l: l),
    "before": tokens(_HALO, lambda l: jnp.maximum(l * per_block - 1, 0)),
    "after": tokens(_HALO, next_halo),
    "state": lambda taps: pl.BlockSpec(
      (1, taps, channels), lambda d, b, l: (b, 0, d)
    ),
    "fixed": fixed,
    "reach": ids(size, lambda l: l),
    "reach_after": ids(_LANES, next_lanes),
  }


def _prepare(weight, bias, state, reach, x):
  """Weights with channels along lanes, in float32; a state that is there."""
  batch, _, channels = x.shape
  wide = jnp.transpose(weight.astype(jnp.float32))
  if bias is None:
    bias = jnp.zeros(channels, jnp.float32)
  if state is None:
    state = jnp.zeros((batch, weight.shape[1] - 1, channels), x.dtype)
  reaches = [] if reach is None else [reach[:, None, :]]
  return wide, bias.astype(jnp.float32)[None, :], state, reaches


def _grid(config, x):
  batch, length, channels = x.shape
  blocks = pl.cdiv(channels, config.channels), pl.cdiv(length, config.length)
  return blocks[0], batch, blocks[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def convolve(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array | None,
  state: jax.Array | None,
  reach: jax.Array | None,
  silu: bool,
  interpret: Any = False,
) -> jax.Array:
  """What `xla.convolve` does; `interpret` is that of `pl.pallas_call`."""
  return _convolve(x, weight, bias, state, reach, silu, interpret)


def _convolve(x, weight, bias, state, reach, silu, interpret):
  config = _config(x.shape[1], x.shape[2])
  specs = _specs(config, x.shape[1])
  wide, row, first, reaches = _prepare(weight, bias, state, reach, x)
  taps = first.shape[1]
  return pl.pallas_call(
    functools.partial(
      _forward_kernel,
      silu=silu,
      length=x.shape[1],
      packed=reach is not None,
    ),
    grid=_grid(config, x),
    in_specs=[
      specs["before"],
      specs["own"],
      specs["state"](taps),
      specs["fixed"](taps + 1),
      specs["fixed"](1),
      *[specs["reach"]] * len(reaches),
    ],
    out_specs=specs["own"],
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch_shapes=[
      pltpu.VMEM((_HALO + config.length, config.channels), jnp.float32)
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel")
    ),
    interpret=interpret,
    name="causal_conv1d_fwd",
  )(x, x, first, wide, row, *reaches)


def _forward(x, weight, bias, state, reach, silu, interpret):
  y = _convolve(x, weight, bias, state, reach, silu, interpret)
  return y, (x, weight, bias, state, reach)


def _backward(silu, interpret, residuals, dy):
  x, weight, bias, state, reach = residuals
  config = _config(x.shape[1], x.shape[2])
  specs = _specs(config, x.shape[1])
  wide, row, first, reaches = _prepare(weight, bias, state, reach, x)
  taps = first.shape[1]
  rows = config.length + _HALO
  dx, dweight, dbias = pl.pallas_call(
    functools.partial(
      _backward_kernel,
      silu=silu,
      length=x.shape[1],
      packed=reach is not None,
    ),
    grid=_grid(config, x),
    in_specs=[
      specs["before"],
      specs["own"],
      specs["after"],
      specs["own"],
      specs["after"],
      specs["state"](taps),
      specs["fixed"](taps + 1),
      specs["fixed"](1),
      *[specs["reach"], specs["reach_after"]][: 2 * len(reaches)],
    ],
    out_specs=[specs["own"], specs["fixed"](taps + 1), specs["fixed"](1)],
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct(wide.shape, jnp.float32),
      jax.ShapeDtypeStruct(row.shape, jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((_HALO + rows, config.channels), jnp.float32),
      pltpu.VMEM((rows, config.channels), jnp.float32),
    ],
    # Weights' gradients are summed over all blocks of the same channels.
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary")
    ),
    interpret=interpret,
    name="causal_conv1d_bwd",
  )(x, x, x, dy, dy, first, wide, row, *(reaches * 2))
  dstate = None
  if state is not None:
    # Only the first tokens see it.
    few = slice(None, taps)
    seen = None if reach is None else reach[:, few]
    of_state = lambda s: xla.convolve(x[:, few], weight, bias, s, seen, silu)
    (dstate,) = jax.vjp(of_state, state)[1](dy[:, few])
  dweight = jnp.transpose(dweight).astype(weight.dtype)
  dbias = None if bias is None else dbias[0].astype(bias.dtype)
  return dx, dweight, dbias, dstate, None


convolve.defvjp(_forward, _backward)
