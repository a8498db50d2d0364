"""The selective scan as TPU kernels: token by token, many channels at once.

A grid of (batch, channel blocks, chunks) walks each sequence chunk by chunk,
with states (N, channels) in registers. Whole chunks are prepared and finished
as tiles; only the recurrence itself goes by tokens. The backward kernel walks
back over the chunks, recomputing their states from the one in front of each.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ops import dispatch
from ops.selective_scan import tuning
from ops.selective_scan.xla import PADDING, RESET

# Tokens of a chunk lie along the lanes in B and C.
_CHUNK = _LANES = 128
_MAX_STATE = 128


@dataclasses.dataclass(frozen=True)
class Config:
  """How the kernels cut their work.

  Attributes:
    channels: Channels of a block, a multiple of 128.
    unroll: Tokens an iteration of the loop over a chunk.
  """

  channels: int
  unroll: int = 8


@dataclasses.dataclass(frozen=True)
class _Options:
  dt_softplus: bool
  config: Config
  interpret: Any


def supports(
  x: Any = None,
  dt: Any = None,
  A: Any = None,
  B: Any = None,
  *arrays: Any,
  **options: Any,
) -> str | None:
  """None where the kernels run, else the reason; see `ops/dispatch.py`."""
  del dt, arrays, options
  reason = dispatch.needs_tpu()
  if reason is not None or x is None:
    return reason
  groups = B.shape[2]
  if groups > 1 and x.shape[2] // groups % _LANES:
    return f"needs a multiple of {_LANES} channels a group"
  if A.shape[1] > _MAX_STATE:
    return f"needs N <= {_MAX_STATE}, this is {A.shape[1]}"
  return None


def _mask(chunk, rows, columns, shape):
  """What of a tile lies inside of (L, D), or None: beyond it is undefined."""
  inside = None
  for axis, (first, edge) in enumerate(
    zip((chunk * rows, pl.program_id(1) * columns), shape)
  ):
    if edge % (rows, columns)[axis]:
      at = first + lax.broadcasted_iota(jnp.int32, (rows, columns), axis)
      inside = at < edge if inside is None else inside & (at < edge)
  return inside


def _tile(ref, inside):
  value = ref[0].astype(jnp.float32)
  return value if inside is None else jnp.where(inside, value, 0.0)


def _by_token(ref, chunk, length):
  """An (N, tokens) tile of B or C, zero beyond the sequence."""
  tile = ref[0, 0]
  if length % _CHUNK:
    at = chunk * _CHUNK + lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    tile = jnp.where(at < length, tile, 0.0)
  return tile


def _step_sizes(dt_ref, bias_ref, inside, softplus):
  """Returns dt and its derivative by the raw dt, (tokens, channels)."""
  raw = _tile(dt_ref, None) + bias_ref[...]
  dt, slope = raw, jnp.ones_like(raw)
  if softplus:
    dt = jnp.maximum(raw, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(raw)))
    slope = jax.nn.sigmoid(raw)
  if inside is not None:
    dt, slope = (jnp.where(inside, v, 0.0) for v in (dt, slope))
  return dt, slope


def _marked(marks_ref, t, row, decay_of):
  """Returns dt and decay at token t, and whether dt is live (1) or not (0)."""
  if marks_ref is None:
    return row, decay_of(row), 1.0
  mark = marks_ref[0, 0, t]
  live = jnp.where(mark == PADDING, 0.0, 1.0)
  row = row * live
  return row, decay_of(row) * jnp.where(mark == RESET, 0.0, 1.0), live


def _column(tile, t):
  """Token t of an (N, tokens) tile, as (N, 1)."""
  lane = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
  return jnp.sum(jnp.where(lane == t, tile, 0.0), axis=1, keepdims=True)


def _set_column(tile, t, column):
  lane = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
  return jnp.where(lane == t, column, tile)


def _over_size(value):
  return jnp.sum(value, axis=0, keepdims=True)


def _over_channels(value):
  return jnp.sum(value, axis=1, keepdims=True)


def _forward_kernel(
  tokens,
  weights,
  initial,
  y_ref,
  state_ref,
  before_ref,
  dt_s,
  u_s,
  y_s,
  *,
  options,
  shape,
):
  x_ref, dt_ref, z_ref, B_ref, C_ref, marks = tokens
  A_ref, D_ref, bias_ref = weights
  chunk = pl.program_id(2)

  @pl.when(chunk == 0)
  def _():
    state_ref[...] = initial[...]

  if before_ref is not None:
    before_ref[0] = state_ref[...]
  inside = _mask(chunk, *dt_s.shape, shape)
  x = _tile(x_ref, inside)
  dt_s[...], _ = _step_sizes(dt_ref, bias_ref, inside, options.dt_softplus)
  u_s[...] = dt_s[...] * x
  A = A_ref[...]
  B, C = (_by_token(ref, chunk, shape[0]) for ref in (B_ref, C_ref))
  decay_of = lambda dt: jnp.exp(dt * A)

  def token(t, h):
    at = pl.ds(t, 1)
    _, decay, _ = _marked(marks, t, dt_s[at], decay_of)
    h = decay * h + u_s[at] * _column(B, t)
    y_s[at] = _over_size(h * _column(C, t))
    return h

  state_ref[0] = lax.fori_loop(
    0, _CHUNK, token, state_ref[0], unroll=options.config.unroll
  )
  y = y_s[...] + D_ref[...] * x
  if z_ref is not None:
    z = _tile(z_ref, None)
    y = y * (z * jax.nn.sigmoid(z))
  y_ref[0] = y.astype(y_ref.dtype)


def _backward_kernel(
  tokens,
  weights,
  before_ref,
  dout_ref,
  dstate_ref,
  dtokens,
  dweights,
  adjoint_ref,
  states_s,
  dt_s,
  u_s,
  y_s,
  dy_s,
  ddt_s,
  *,
  options,
  shape,
):
  x_ref, dt_ref, z_ref, B_ref, C_ref, marks = tokens
  A_ref, D_ref, bias_ref = weights
  dx_ref, ddt_ref, dz_ref, dB_ref, dC_ref = dtokens
  dA_ref, dD_ref, dbias_ref = dweights
  chunk = pl.num_programs(2) - 1 - pl.program_id(2)

  @pl.when(pl.program_id(2) == 0)
  def _():
    adjoint_ref[...] = dstate_ref[...]
    for ref in dweights:
      ref[...] = jnp.zeros_like(ref)

  inside = _mask(chunk, *dt_s.shape, shape)
  x, dy = _tile(x_ref, inside), _tile(dout_ref, inside)
  dt, slope = _step_sizes(dt_ref, bias_ref, inside, options.dt_softplus)
  dt_s[...], u_s[...] = dt, dt * x
  if z_ref is not None:
    z = _tile(z_ref, inside)
    gate = jax.nn.sigmoid(z)
    # By the gated output first: the ungated one is not known yet.
    dgate = dy * (gate * (1.0 + z * (1.0 - gate)))
    dy = dy * (z * gate)
  dy_s[...] = dy
  A = A_ref[...]
  B, C = (_by_token(ref, chunk, shape[0]) for ref in (B_ref, C_ref))
  decay_of = lambda dt: jnp.exp(dt * A)

  def recompute(t, h):
    at = pl.ds(t, 1)
    states_s[t] = h
    _, decay, _ = _marked(marks, t, dt_s[at], decay_of)
    h = decay * h + u_s[at] * _column(B, t)
    if z_ref is not None:
      y_s[at] = _over_size(h * _column(C, t))
    return h

  def back(i, carry):
    g, dA, dB, dC = carry
    t = _CHUNK - 1 - i
    at = pl.ds(t, 1)
    B_t, C_t = _column(B, t), _column(C, t)
    u, dy = u_s[at], dy_s[at]
    dt, decay, live = _marked(marks, t, dt_s[at], decay_of)
    decayed = decay * states_s[t]
    g = g + C_t * dy
    dC = _set_column(dC, t, _over_channels((decayed + u * B_t) * dy))
    dB = _set_column(dB, t, _over_channels(g * u))
    gp = g * decayed
    u_s[at] = _over_size(g * B_t)
    ddt_s[at] = _over_size(gp * A) * live
    return decay * g, dA + gp * dt, dB, dC

  unroll = options.config.unroll
  lax.fori_loop(0, _CHUNK, recompute, before_ref[0, 0], unroll=unroll)
  zeros = jnp.zeros_like(B)
  adjoint_ref[0], dA_ref[0], dB_ref[0, 0], dC_ref[0, 0] = lax.fori_loop(
    0,
    _CHUNK,
    back,
    (adjoint_ref[0], dA_ref[0], zeros, zeros),
    unroll=unroll,
  )
  du = u_s[...]
  dx = dt * du + D_ref[...] * dy
  ddt = (ddt_s[...] + x * du) * slope
  if z_ref is not None:
    dz_ref[0] = (dgate * (y_s[...] + D_ref[...] * x)).astype(dz_ref.dtype)
  dx_ref[0], ddt_ref[0] = dx.astype(dx_ref.dtype), ddt.astype(ddt_ref.dtype)
  dD_ref[0] += _over_size(dy * x)
  dbias_ref[0] += _over_size(ddt)


def _prepare(options, x, dt, A, B, C, D, z, dt_bias, initial_state, marks):
  """Lays out the arguments: channels along lanes, and tokens in B and C.

  Small arrays are filled up to whole blocks of channels, large ones are not.
  """
  batch, length, channels = x.shape
  fill = -channels % options.config.channels
  f32 = lambda a: a.astype(jnp.float32)
  full = lambda a: jnp.pad(f32(a), [(0, 0)] * (a.ndim - 1) + [(0, fill)])
  row = lambda a: full((jnp.zeros(channels) if a is None else a)[None])
  by_token = lambda a: f32(a).transpose(0, 2, 3, 1)
  if initial_state is None:
    initial_state = jnp.zeros((batch, *A.shape), jnp.float32)
  if marks is not None:
    tail = [(0, 0), (0, -length % _CHUNK)]
    marks = jnp.pad(marks, tail, constant_values=PADDING)[:, None]
  tokens = (x, dt, z, by_token(B), by_token(C), marks)
  weights = (full(A.T), row(D), row(dt_bias))
  return tokens, weights, full(initial_state.swapaxes(1, 2))


def _specs(options, x, B, reverse):
  """Returns the grid, and the blocks of everything that kernels see."""
  batch, length, channels = x.shape
  groups, size = B.shape[2:]
  wide, chunks = options.config.channels, pl.cdiv(length, _CHUNK)
  blocks = pl.cdiv(channels, wide)
  at = (lambda c: chunks - 1 - c) if reverse else (lambda c: c)
  group = lambda d: lax.div(d, blocks // groups)
  return (batch, blocks, chunks), {
    "tokens": pl.BlockSpec((1, _CHUNK, wide), lambda b, d, c: (b, at(c), d)),
    "group": pl.BlockSpec(
      (1, 1, size, _CHUNK), lambda b, d, c: (b, group(d), 0, at(c))
    ),
    "block": pl.BlockSpec(
      (1, 1, size, _CHUNK), lambda b, d, c: (b, d, 0, at(c))
    ),
    "marks": pl.BlockSpec(
      (1, 1, _CHUNK),
      lambda b, d, c: (b, 0, at(c)),
      memory_space=pltpu.SMEM,
    ),
    "A": pl.BlockSpec((size, wide), lambda b, d, c: (0, d)),
    "row": pl.BlockSpec((1, wide), lambda b, d, c: (0, d)),
    "state": pl.BlockSpec((1, size, wide), lambda b, d, c: (b, 0, d)),
    "sum": pl.BlockSpec((1, 1, wide), lambda b, d, c: (b, 0, d)),
    "before": pl.BlockSpec(
      (1, 1, size, wide), lambda b, d, c: (at(c), b, 0, d)
    ),
  }


def _token_specs(specs, tokens):
  wanted = ("tokens", "tokens", "tokens", "group", "group", "marks")
  return tuple(
    None if value is None else specs[name]
    for name, value in zip(wanted, tokens)
  )


def _parameters():
  semantics = ("parallel", "parallel", "arbitrary")
  return pltpu.CompilerParams(dimension_semantics=semantics)


def _scratch(options, tiles):
  shape = (_CHUNK, options.config.channels)
  return [pltpu.VMEM(shape, jnp.float32)] * tiles


def _run_forward(options, arrays, marks, residuals):
  """Returns y, the final state (B, N, D'), and the states between chunks."""
  x, B = arrays[0], arrays[3]
  tokens, weights, initial = _prepare(options, *arrays, marks)
  grid, specs = _specs(options, x, B, reverse=False)
  before = jax.ShapeDtypeStruct((grid[2], *initial.shape), jnp.float32)
  return pl.pallas_call(
    functools.partial(_forward_kernel, options=options, shape=x.shape[1:]),
    grid=grid,
    in_specs=[
      _token_specs(specs, tokens),
      (specs["A"], specs["row"], specs["row"]),
      specs["state"],
    ],
    out_specs=(
      specs["tokens"],
      specs["state"],
      specs["before"] if residuals else None,
    ),
    out_shape=(
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct(initial.shape, jnp.float32),
      before if residuals else None,
    ),
    scratch_shapes=_scratch(options, 3),
    compiler_params=_parameters(),
    interpret=options.interpret,
    name="selective_scan_fwd",
  )(tokens, weights, initial)


def _to_state(state, channels):
  return state[..., :channels].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, arrays, marks):
  y, state, _ = _run_forward(options, arrays, marks, residuals=False)
  return y, _to_state(state, y.shape[2])


def _forward(options, arrays, marks):
  y, state, before = _run_forward(options, arrays, marks, residuals=True)
  return (y, _to_state(state, y.shape[2])), (arrays, marks, before)


def _backward(options, residuals, cotangents):
  arrays, marks, before = residuals
  x, dt, A, B, C, D, z, dt_bias, initial_state = arrays
  batch, length, channels = x.shape
  groups, size = B.shape[2:]
  tokens, weights, _ = _prepare(options, *arrays, marks)
  grid, specs = _specs(options, x, B, reverse=True)
  dout, dstate = cotangents
  wide = before.shape[-1]
  dstate = dstate.astype(jnp.float32).swapaxes(1, 2)
  dstate = jnp.pad(dstate, [(0, 0), (0, 0), (0, wide - channels)])
  of = jax.ShapeDtypeStruct
  summed = of((batch, 1, wide), jnp.float32)
  by_block = of((batch, grid[1], size, length), jnp.float32)
  like = lambda a: None if a is None else of(a.shape, a.dtype)
  (dx, ddt, dz, dB, dC), (dA, dD, dbias), dinitial = pl.pallas_call(
    functools.partial(_backward_kernel, options=options, shape=x.shape[1:]),
    grid=grid,
    in_specs=[
      _token_specs(specs, tokens),
      (specs["A"], specs["row"], specs["row"]),
      specs["before"],
      specs["tokens"],
      specs["state"],
    ],
    out_specs=(
      (
        specs["tokens"],
        specs["tokens"],
        None if z is None else specs["tokens"],
        specs["block"],
        specs["block"],
      ),
      (specs["state"], specs["sum"], specs["sum"]),
      specs["state"],
    ),
    out_shape=(
      (like(x), like(dt), like(z), by_block, by_block),
      (of((batch, size, wide), jnp.float32), summed, summed),
      of((batch, size, wide), jnp.float32),
    ),
    scratch_shapes=[
      pltpu.VMEM((_CHUNK, size, options.config.channels), jnp.float32),
      *_scratch(options, 5),
    ],
    compiler_params=_parameters(),
    interpret=options.interpret,
    name="selective_scan_bwd",
  )(tokens, weights, before, dout, dstate)

  def of_group(a):
    a = a.reshape(batch, groups, -1, size, length).sum(2)
    return a.transpose(0, 3, 1, 2).astype(B.dtype)

  def of_channels(a, like):
    return None if like is None else a[..., :channels].astype(like.dtype)

  dA = of_channels(dA.sum(0), A).T
  dD, dbias = (
    of_channels(a.sum((0, 1)), like) for a, like in ((dD, D), (dbias, dt_bias))
  )
  if initial_state is not None:
    dinitial = _to_state(dinitial, channels).astype(initial_state.dtype)
  else:
    dinitial = None
  return (
    dx,
    ddt,
    dA,
    of_group(dB),
    of_group(dC),
    dD,
    dz,
    dbias,
    dinitial,
  ), None


_scan.defvjp(_forward, _backward)


def selective_scan(
  x,
  dt,
  A,
  B,
  C,
  D,
  z,
  dt_bias,
  initial_state,
  marks,
  *,
  dt_softplus,
  config=None,
  interpret=False,
):
  """What `xla.selective_scan` does; `interpret` is that of `pl.pallas_call`."""
  if config is None:
    config = Config(tuning.tpu_channels(x.shape[2], *B.shape[2:]))
  options = _Options(dt_softplus, config, interpret)
  arrays = (x, dt, A, B, C, D, z, dt_bias, initial_state)
  return _scan(options, arrays, marks)
