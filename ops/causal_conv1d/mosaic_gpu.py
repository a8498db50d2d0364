"""The causal convolution as GPU kernels: one pass over memory each way.

The forward kernel is here, the backward one in `mosaic_gpu_backward`, and
`mosaic_gpu_walk` says how both go over the tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ops import dispatch
from ops.causal_conv1d import mosaic_gpu_walk as walks
from ops.causal_conv1d import xla
from ops.causal_conv1d.mosaic_gpu_backward import backward
from ops.causal_conv1d.mosaic_gpu_walk import Walk
from ops.hopper import PROCESSORS

NAME = "causal_conv1d_fwd"
_THREADS, _ROWS = 128, 8
# Tokens of a block, at most.
_MOST = 256
# Blocks that a multiprocessor has registers for: of the forward kernel by the
# channels of a thread, and of the backward one.
_FORWARD, _BACKWARD = {2: 7, 4: 4}, 4
# Tokens that take as long as what a block does before the first one.
_STARTING = 8


@dataclasses.dataclass(frozen=True)
class Config:
  """How both kernels are cut."""

  forward: Walk
  backward: Walk


def configure(
  batch: int, length: int, channels: int, dtype: Any = jnp.bfloat16
) -> Config:
  """Returns the Config for shapes; pure.

  The blocks that fit on the chip at once are a wave, and the last wave takes as
  long as a whole one. So of all walks up to a length that one is taken whose
  waves, times the time of a block, are least. Forward threads of four channels
  are the faster ones, where these divide, and backward those of two (by 9% and
  3% at 8 x 2048 x 1536 and 8 x 4096 x 4096, on an H200). The machine's
  hyperbolic tangent saves up to a seventh of the time. It is good to 5e-4, and
  results in bfloat16 differ by 9e-5 of their norm, beside 1.7e-3 that rounding
  costs; float32 keeps roots.
  """
  rows = min(_ROWS, length)
  gate = "tanh" if jnp.dtype(dtype).itemsize == 2 else "root"

  def walk(vector, shared):
    columns = batch * pl.cdiv(channels, vector * _THREADS)

    def time(tokens):
      blocks = columns * pl.cdiv(length, tokens)
      return pl.cdiv(blocks, PROCESSORS * shared) * (tokens + _STARTING)

    sizes = range(rows, min(_MOST, length) + 1, rows)
    return Walk(vector, rows, min(sizes, key=time), gate)

  wide = 4 if channels % (4 * _THREADS) == 0 else 2
  return Config(walk(wide, _FORWARD[wide]), walk(2, _BACKWARD))


def supports(
  x: Any = None, weight: Any = None, *arrays: Any, **options: Any
) -> str | None:
  """None where the kernels run, else the reason; see `ops/dispatch.py`."""
  del arrays, options
  reason = dispatch.needs_hopper()
  return reason if reason or x is None else unfit(x, weight)


def unfit(x: Any, weight: Any) -> str | None:
  """Returns what about shapes and dtypes the kernels cannot do, or None."""
  _, length, channels = x.shape
  taps = weight.shape[1]
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f"needs x in bfloat16 or float32, this is {x.dtype}"
  if channels < 2 * _THREADS or channels % 2:
    least = 2 * _THREADS
    return f"needs an even number of channels from {least}, not {channels}"
  if not 2 <= taps <= _ROWS:
    return f"needs 2 to {_ROWS} taps, these are {taps}"
  if length < taps - 1:
    return f"needs at least {taps - 1} tokens for {taps} taps, not {length}"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def convolve(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array | None,
  state: jax.Array | None,
  reach: jax.Array | None,
  silu: bool,
  config: Config | None = None,
  interpret: Any = False,
) -> jax.Array:
  """What `xla.convolve` does.

  Exponentials and roots are the hardware's, good to 2e-7, and so is the
  hyperbolic tangent, good to 5e-4, which bfloat16 takes. `config` is by
  default that of `configure`, `interpret` is that of `plgpu.kernel`.
  """
  return _forward(x, weight, bias, state, reach, silu, config, interpret)[0]


def _operands(**arrays):
  return {name: array for name, array in arrays.items() if array is not None}


# Compiled by themselves, so that many layers lower their kernels once.
@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _forward(x, weight, bias, state, reach, silu, config, interpret):
  config = config or configure(*x.shape, x.dtype)
  y = forward(
    _operands(x=x, weight=weight, bias=bias, state=state, reach=reach),
    walk=config.forward,
    silu=silu,
    interpret=interpret,
  )
  return y, (x, weight, bias, state, reach)


def forward(
  operands: dict[str, jax.Array], *, walk: Walk, silu: bool, interpret: Any
) -> jax.Array:
  """Runs the kernel.

  Args:
    operands: x and weight, and optionally bias, state and reach, as of
      `xla.convolve`.
    walk: How to cut the problem.
    silu: Whether to apply SiLU.
    interpret: Of `plgpu.kernel`.

  Returns:
    (B, L, D) in x's dtype.
  """
  x, taps = operands["x"], operands["weight"].shape[1]
  names = tuple(operands)

  def body(*refs, taps_, ring=None, arrived=None):
    *refs, y = refs
    given = dict(zip(names, refs, strict=True))
    row, first, own = walk.place(x)
    x_, y_ = given["x"].at[row, :, own], y.at[row, :, own]
    state_ = given["state"].at[row, :, own] if "state" in given else None

    def fetch(token):
      reach = [None] * walk.rows
      if "reach" in given:
        reach = [given["reach"][row, token + k] for k in range(walk.rows)]
      if walk.ring:
        return [], reach
      return walk.load_rows(x_, token), reach

    def copy(step):
      """Starts to fetch a step's tokens into the ring."""
      slot = lax.rem(step, jnp.int32(walk.ring))
      tokens = pl.ds(first + step * walk.rows, walk.rows)
      plgpu.copy_gmem_to_smem(
        given["x"].at[row, tokens, own], ring.at[slot], arrived.at[slot]
      )

    def taken(step):
      """A step's tokens, once they are in the ring."""
      slot = lax.rem(step, jnp.int32(walk.ring))
      plgpu.barrier_wait(arrived.at[slot])
      values = [walk.load(ring.at[slot, k]) for k in range(walk.rows)]
      # All warps have read what is written over.
      walks.meet(bool(interpret))

      @pl.when(step + walk.ring < walk.steps)
      def _():
        copy(step + walk.ring)

      return values

    def some_tokens(step, carry):
      before, now = carry
      token = first + step * walk.rows
      # Else the compiler would move these loads behind the work on this step.
      following = lax.cond(
        step + 1 < walk.steps,
        lambda now: fetch(token + walk.rows),
        lambda now: now,
        now,
      )
      loaded, reaches = now
      if walk.ring:
        loaded = taken(step)
      for k, (values, reach) in enumerate(zip(loaded, reaches, strict=True)):
        inputs = [values.astype(jnp.float32), *before]
        out = walks.preactivation(inputs, weights, bias, reach)
        if silu:
          out = walks.silu(out, walk.gate)
        target = y_.at[pl.ds(token, walk.rows)].at[k]
        target[...] = walks.seen(out, reach, 0).astype(y.dtype)
        before = inputs[:-1]
      return before, following

    for step in range(min(walk.ring, walk.steps)):
      copy(jnp.int32(step))
    now = fetch(first)
    before = walk.load_before(x_, state_, first, taps)
    bias, weights = walk.load_weights(given, own, taps_, silu)
    lax.fori_loop(0, walk.steps, some_tokens, (before, now))

  scratch = {}
  if walk.ring:
    scratch["ring"] = plgpu.SMEM((walk.ring, walk.rows, walk.channels), x.dtype)
    scratch["arrived"] = plgpu.Barrier(num_barriers=walk.ring)
  kernel = walk.kernel(
    body,
    x,
    taps,
    NAME,
    scratch,
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    interpret=interpret,
  )
  return kernel(*operands.values())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(silu, config, interpret, residuals, dy):
  x, weight, bias, state, reach = residuals
  taps = weight.shape[1]
  config = config or configure(*x.shape, x.dtype)
  dx, sums = backward(
    _operands(x=x, dy=dy, weight=weight, bias=bias, state=state, reach=reach),
    walk=config.backward,
    silu=silu,
    interpret=interpret,
  )
  sums = jnp.sum(sums, axis=(0, 1))
  dweight = jnp.transpose(sums[:taps]).astype(weight.dtype)
  dbias = None if bias is None else sums[taps].astype(bias.dtype)
  dstate = None
  if state is not None:
    # Only the first tokens see it.
    few = slice(None, taps - 1)
    visible = None if reach is None else reach[:, few]
    of_state = lambda s: xla.convolve(x[:, few], weight, bias, s, visible, silu)
    (dstate,) = jax.vjp(of_state, state)[1](dy[:, few])
  return dx, dweight, dbias, dstate, None


convolve.defvjp(_forward, _backward)
