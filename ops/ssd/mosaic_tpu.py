"""`ssd` as TPU kernels, forward and backward: one pass over memory each way.

The grid is (batch, blocks of heads, chunks). Chunks run in order, and the state
of a block's heads stays in fast memory from one to the next: (N, heads * P),
so that products with B and C are large. Backward, chunks run from the last to
the first with the gradient of the state, and the states that forward kept.

D is part of the kernels. The gate z is left to XLA, as are softplus and bias.
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
from ops.ssd import tuning

_CHUNK = 128
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
  """What one step of the grid works on.

  Attributes:
    chunk_size: Tokens, a multiple of 16.
    heads: Heads of one group; see `tuning.tpu_heads`.
    groups: Groups of all heads.
    interpret: What `pallas_call` takes, to run on a CPU in tests.
  """

  chunk_size: int
  heads: int
  groups: int
  interpret: Any = False


def supports(
  x: Any = None, B: Any = None, *, chunk_size: int | None = None
) -> str | None:
  """None where the kernels run, else the reason; see `ops/dispatch.py`."""
  reason = dispatch.needs_tpu()
  if reason is not None or x is None:
    return reason
  heads, channels = x.shape[2:]
  groups, state_size = B.shape[2:]
  if tuning.tpu_heads(heads, groups, channels) is None:
    return (
      f"needs whole vectors of {_LANES} channels in a group, these are"
      f" {heads // groups} heads of {channels}"
    )
  if groups > 1 and state_size % _LANES:
    return f"needs N % {_LANES} = 0 with several groups, N is {state_size}"
  if (chunk_size or _CHUNK) % 16:
    return f"needs a chunk size that is a multiple of 16, not {chunk_size}"
  return None


def forward(
  x,
  log_decay,
  dt,
  B,
  C,
  initial_state,
  D,
  z,
  *,
  chunk_size: int | None = None,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Implements `ssd` on a TPU; arguments as in `ops.ssd.api.apply`."""
  b, length, h, p = x.shape
  g, n = B.shape[2:]
  heads = tuning.tpu_heads(h, g, p)
  config = Config(chunk_size or _CHUNK, heads, g, interpret)
  padding = -length % config.chunk_size

  def padded(v, *shape):
    v = jnp.pad(v, [(0, 0), (0, padding)] + [(0, 0)] * (v.ndim - 2))
    return v.reshape(b, length + padding, *shape)

  def rows(v):
    """Tokens of a chunk side by side: (B, blocks, C, heads of a block, Q)."""
    v = padded(v, h // heads, heads)
    v = v.reshape(b, -1, config.chunk_size, h // heads, heads)
    return v.transpose(0, 3, 1, 4, 2)

  if initial_state is None:
    initial_state = jnp.zeros((b, h, p, n), jnp.float32)
  if D is None:
    D = jnp.zeros((h, 1), jnp.float32)
  D = jnp.broadcast_to(D, (h, p))
  y, state = _scan(
    config,
    padded(x, h * p),
    rows(log_decay),
    rows(dt),
    padded(B, g * n),
    padded(C, g * n),
    jnp.moveaxis(initial_state, -1, 1).reshape(b, n, h * p),
    D.reshape(1, h * p),
  )
  y = y[:, :length].reshape(x.shape)
  if z is not None:
    gated = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    y = gated.astype(x.dtype)
  return y, jnp.moveaxis(state.reshape(b, n, h, p), 1, -1)


def _dot(a, b, over: tuple[int, int] = (1, 0)):
  """Multiplies matrices, summing axis `over[0]` of a and `over[1]` of b."""
  # The product of bfloat16 numbers is exact: higher precision is not defined.
  exact = a.dtype == jnp.bfloat16
  return lax.dot_general(
    a,
    b,
    (((over[0],), (over[1],)), ((), ())),
    precision=lax.Precision.DEFAULT if exact else None,
    preferred_element_type=jnp.float32,
  )


def _triangle(size: int, upper: bool = False):
  """Where row >= column, or where row < column."""
  row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
  column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
  return row < column if upper else row >= column


class _Decays:
  """Decays of a chunk, from sums of whole numbers and of what is left of them.

  See `ops.ssd.xla`. Rows are (heads, Q), columns (Q, heads).
  """

  def __init__(self, coarse, fine, dt):
    self.rows = coarse, fine
    self.columns = coarse.T, fine.T
    from_start = jnp.exp(coarse + fine)
    to_end = jnp.exp((coarse[:, -1:] - coarse) + (fine[:, -1:] - fine))
    self.whole = from_start[:, -1:]
    self.to_end = to_end
    self.from_start_columns = from_start.T
    self.added_columns = (to_end * dt).T

  def pairs(self, h: int):
    """(Q, Q): what is left at the row's token of the column's."""
    exponent = 0.0
    for row, column in zip(self.rows, self.columns):
      exponent += column[:, h : h + 1] - row[h : h + 1]
    causal = _triangle(exponent.shape[0])
    return jnp.exp(jnp.where(causal, exponent, -jnp.inf))


def _slices(heads: int, width: int):
  channels = width // heads
  return [slice(h * channels, (h + 1) * channels) for h in range(heads)]


def _forward_kernel(
  x, coarse, fine, dt, B, C, initial, D, y, final, *refs, save
):  # fmt: skip
  *starts, state, scaled = refs
  chunk = pl.program_id(2)

  @pl.when(chunk == 0)
  def _():
    state[...] = initial[0]

  dt = dt[0, 0, 0]
  decays = _Decays(coarse[0, 0, 0], fine[0, 0, 0], dt)
  scores = _dot(C[0], B[0], (1, 1))
  start = state[...].astype(x.dtype)
  if save:
    starts[0][0, 0] = start
  read = _dot(C[0], start)
  for h, own in enumerate(_slices(dt.shape[0], x.shape[2])):
    x_own = x[0, :, own]
    x_wide = x_own.astype(jnp.float32)
    weights = scores * decays.pairs(h) * dt[h : h + 1]
    out = _dot(weights.astype(x.dtype), x_own)
    out += decays.from_start_columns[:, h : h + 1] * read[:, own]
    y[0, :, own] = (out + D[:, own] * x_wide).astype(y.dtype)
    added = x_wide * decays.added_columns[:, h : h + 1]
    scaled[:, own] = added.astype(x.dtype)
    state[:, own] *= decays.whole[h : h + 1]
  state[...] += _dot(B[0], scaled[...], (0, 0))

  @pl.when(chunk == pl.num_programs(2) - 1)
  def _():
    final[0] = state[...]


def _backward_kernel(
  x, coarse, fine, dt, B, C, D, start, dy, dfinal,
  dx, dlog_decay, ddt, dB, dC, dinitial,
  dstate, x_scaled, dy_scaled,
):  # fmt: skip
  turn = pl.program_id(2)

  @pl.when(turn == 0)
  def _():
    dstate[...] = dfinal[0]

  dtype, size = x.dtype, x.shape[1]
  dt = dt[0, 0, 0]
  heads = dt.shape[0]
  decays = _Decays(coarse[0, 0, 0], fine[0, 0, 0], dt)
  scores = _dot(C[0], B[0], (1, 1))
  dstate_wide, start_wide = dstate[...], start[0, 0].astype(jnp.float32)
  dstate_cast = dstate_wide.astype(dtype)
  passed = _dot(B[0], dstate_cast)
  read = _dot(C[0], start[0, 0])
  before = _triangle(size, upper=True)
  head = lax.broadcasted_iota(jnp.int32, (size, heads), 1)
  leaving = reaching = jnp.zeros((size, heads), jnp.float32)
  dscores = jnp.zeros((size, size), jnp.float32)
  for h, own in enumerate(_slices(heads, x.shape[2])):
    row = slice(h, h + 1)
    x_own, dy_own = x[0, :, own], dy[0, :, own]
    x_wide, dy_wide = x_own.astype(jnp.float32), dy_own.astype(jnp.float32)
    from_start = decays.from_start_columns[:, row]
    added = decays.added_columns[:, row]
    pairs = decays.pairs(h)
    dweights = _dot(dy_own, x_own, (1, 1)) * pairs
    dscores += dweights * dt[row]
    per_dt = dweights * scores
    weights = (scores * pairs * dt[row]).astype(dtype)
    dx_own = _dot(weights, dy_own, (0, 0)) + passed[:, own] * added
    dx[0, :, own] = (dx_own + D[:, own] * dy_wide).astype(dx.dtype)

    # As in ops.ssd.xla: sums of all that crosses a token, nothing cancels.
    prefix = _dot((per_dt * dt[row]).astype(dtype), before.astype(dtype))
    crossing = jnp.where(before, 0.0, prefix)
    through = jnp.sum(
      start_wide[:, own] * dstate_wide[:, own], axis=(0, 1), keepdims=True
    )
    dlog_decay[0, 0, 0, row] = (
      jnp.sum(crossing, axis=0, keepdims=True) + through * decays.whole[row]
    )
    ddt[0, 0, 0, row] = jnp.sum(per_dt, axis=0, keepdims=True)
    column = jnp.sum(passed[:, own] * x_wide, axis=1, keepdims=True)
    leaving = jnp.where(head == h, column, leaving)
    column = jnp.sum(read[:, own] * dy_wide, axis=1, keepdims=True)
    reaching = jnp.where(head == h, column * from_start, reaching)
    x_scaled[:, own] = (x_wide * added).astype(dtype)
    dy_scaled[:, own] = (dy_wide * from_start).astype(dtype)
    dstate[:, own] *= decays.whole[row]

  leaving = leaving.T * decays.to_end
  ddt[0, 0, 0] += leaving
  exact = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
  until, since = before.astype(jnp.float32), _triangle(size).astype(jnp.float32)
  dlog_decay[0, 0, 0] += exact(leaving * dt, until) + exact(reaching.T, since)
  dscores = dscores.astype(dtype)
  dB[0, 0] = _dot(dscores, C[0], (0, 0)) + _dot(
    x_scaled[...], dstate_cast, (1, 1)
  )
  dC[0, 0] = _dot(dscores, B[0]) + _dot(dy_scaled[...], start[0, 0], (1, 1))
  dstate[...] += _dot(C[0], dy_scaled[...], (0, 0))

  @pl.when(turn == pl.num_programs(2) - 1)
  def _():
    dinitial[0] = dstate[...]


def _sums(log_decay):
  """Whole numbers, summed exactly, and the rest; see `ops.ssd.xla`."""
  coarse = lax.round(log_decay, lax.RoundingMethod.TO_NEAREST_EVEN)
  return [lax.cumsum(v, axis=4) for v in (coarse, log_decay - coarse)]


def _specs(config: Config, x, B, dt, reverse: bool):
  """Blocks by name, of the grid (batch, blocks of heads, chunks)."""
  blocks, chunks = dt.shape[1:3]
  size, width = config.chunk_size, x.shape[2] // blocks
  n, per_group = B.shape[2] // config.groups, blocks // config.groups
  at = (lambda c: chunks - 1 - c) if reverse else (lambda c: c)
  rows = (1, 1, 1, config.heads, size)
  group = lambda h: lax.div(h, jnp.int32(per_group))
  return {
    "x": pl.BlockSpec((1, size, width), lambda b, h, c: (b, at(c), h)),
    "rows": pl.BlockSpec(rows, lambda b, h, c: (b, h, at(c), 0, 0)),
    "B": pl.BlockSpec((1, size, n), lambda b, h, c: (b, at(c), group(h))),
    "state": pl.BlockSpec((1, n, width), lambda b, h, c: (b, 0, h)),
    "D": pl.BlockSpec((1, width), lambda b, h, c: (0, h)),
    "starts": pl.BlockSpec((1, 1, n, width), lambda b, h, c: (b, at(c), 0, h)),
    "dB": pl.BlockSpec((1, 1, size, n), lambda b, h, c: (b, h, at(c), 0)),
  }


def _call(kernel, name, config, arrays, inputs, outputs, scratch, reverse):
  """Calls a kernel; `outputs` are pairs of a spec's name and a shape."""
  x, dt, B = arrays[0], arrays[3], arrays[4]
  specs = _specs(config, x, B, dt, reverse)
  return pl.pallas_call(
    kernel,
    grid=(x.shape[0], *dt.shape[1:3]),
    in_specs=[specs[spec] for spec in inputs.split()],
    out_specs=[specs[spec] for spec, _ in outputs],
    out_shape=[shape for _, shape in outputs],
    scratch_shapes=[
      pltpu.VMEM(specs[spec].block_shape[-2:], dtype) for spec, dtype in scratch
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=config.interpret,
    name=name,
  )(*arrays)


def _run_forward(config, x, log_decay, dt, B, C, initial, D, save=False):
  wide = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  outputs = [
    ("x", jax.ShapeDtypeStruct(x.shape, x.dtype)),
    ("state", wide(initial.shape)),
  ]
  if save:
    shape = (x.shape[0], dt.shape[2], *initial.shape[1:])
    outputs.append(("starts", jax.ShapeDtypeStruct(shape, x.dtype)))
  sums = _sums(log_decay)
  y, final, *starts = _call(
    functools.partial(_forward_kernel, save=save),
    "ssd_fwd",
    config,
    (x, *sums, dt, B, C, initial, D),
    "x rows rows rows B B state D",
    outputs,
    [("state", jnp.float32), ("x", x.dtype)],
    reverse=False,
  )
  return (y, final), (x, *sums, dt, B, C, D, *starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(config, x, log_decay, dt, B, C, initial, D):
  return _run_forward(config, x, log_decay, dt, B, C, initial, D)[0]


def _scan_forward(config, *arrays):
  return _run_forward(config, *arrays, save=True)


def _scan_backward(config, residuals, cotangents):
  x, _, _, dt, B, C, D, _ = residuals
  dy, dfinal = cotangents
  blocks = dt.shape[1]
  wide = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  per_block = (B.shape[0], blocks, B.shape[1], B.shape[2] // config.groups)
  dx, dlog_decay, ddt, dB, dC, dinitial = _call(
    _backward_kernel,
    "ssd_bwd",
    config,
    (*residuals, dy, dfinal),
    "x rows rows rows B B D starts x state",
    [
      ("x", jax.ShapeDtypeStruct(x.shape, x.dtype)),
      ("rows", wide(dt.shape)),
      ("rows", wide(dt.shape)),
      ("dB", wide(per_block)),
      ("dB", wide(per_block)),
      ("state", wide(dfinal.shape)),
    ],
    [("state", jnp.float32), ("x", x.dtype), ("x", x.dtype)],
    reverse=True,
  )

  def summed(v):
    """Sums over the blocks of a group: (B, blocks, L, N) to (B, L, G N)."""
    b, _, length, n = v.shape
    v = jnp.sum(v.reshape(b, config.groups, -1, length, n), axis=2)
    return jnp.moveaxis(v, 1, 2).reshape(B.shape).astype(B.dtype)

  dD = jnp.einsum("blc,blc->c", x, dy, preferred_element_type=jnp.float32)
  dB, dC, dD = summed(dB), summed(dC), dD[None].astype(D.dtype)
  return dx, dlog_decay, ddt, dB, dC, dinitial, dD


_scan.defvjp(_scan_forward, _scan_backward)
