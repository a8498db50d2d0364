"""The Mosaic GPU `ssd` for Hopper: bfloat16, TMA loads and wgmma products.

Per chunk of 64 tokens a head moves x and y (2 * 8 KB; B and C come from the L2
cache) and multiplies 1.8 million pairs (N = 128), 900 cycles of the matrix
units of a multiprocessor: memory and matrix units would take about as long.

- Forward: one kernel; the state never leaves registers in float32. A row whose
  heads are too few to fill the device is cut into segments, whose states come
  from a pass over x and B alone (`segment_starts`).
- Decays: one kernel sums the log decays along chunks in front of the forward
  pass, another one sums their gradients behind the backward one.
- Backward: two passes write the states before each chunk and the gradients of
  the states after each chunk in bfloat16; then all chunks are independent, and
  one kernel gives every gradient, summing those of B and C over a block's heads
  in registers.

Decays are cumulative within a chunk, so their differences carry the rounding
of a float32: at most 64 * 128, an error of 5e-4, below the bfloat16
rounding of the products. Resets need no mask: they are decays that underflow.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ops import dispatch
from ops.hopper import PROCESSORS
from ops.ssd import (
  mosaic_gpu_backward,
  mosaic_gpu_decays,
  mosaic_gpu_forward,
  mosaic_gpu_states,
)
from ops.ssd.mosaic_gpu_tiles import CHANNELS, CHUNK, STATE_SIZES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels are launched.

  Attributes:
    heads: Heads of a thread block in the scans: 1, 2 or 3, a divisor of the
      heads of a group.
    stages: Chunks in flight from memory in the scans.
    segments: Pieces that a row is cut into, at most its chunks.
    splits: Thread blocks that share the heads of a group in the gradients of a
      chunk.
    gradient_stages: Heads in flight from memory in the gradients of a chunk.
    barriers: Whether the compiler puts a barrier around every use of shared
      memory, or only those that the kernels ask for stand.
  """

  heads: int = 2
  stages: int = 3
  segments: int = 1
  splits: int = 1
  gradient_stages: int = 2
  barriers: bool = True

  def compiler_params(self) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=not self.barriers
    )


def configure(batch: int, length: int, heads: int, groups: int) -> Config:
  """Returns the Config for shapes; pure."""
  chunks = -(-length // CHUNK)
  per_group = heads // groups
  together = 1 if per_group % 2 else 2
  blocks = batch * heads // together

  def cost(segments):
    # The cost is counted in chunks that a multiprocessor takes in turn. Several
    # segments need a pass for their states, which takes about half as long as
    # that for the outputs, and launches and sums that take as long as some
    # chunks.
    steps = -(-blocks * segments // PROCESSORS) * -(-chunks // segments)
    return steps if segments == 1 else 1.5 * steps + 16 + 2 * segments

  def fits(segments):
    return (segments - 1) * -(-chunks // segments) < chunks

  segments = min(filter(fits, range(1, min(16, chunks) + 1)), key=cost)
  splits = 1
  while 2 * batch * chunks * groups * splits <= PROCESSORS:
    if per_group % (2 * splits):
      break
    splits *= 2
  return Config(heads=together, segments=segments, splits=splits)


def supports(x=None, B=None, *, chunk_size=None, **unused) -> str | None:
  """Returns None where `forward` runs on these arguments, else why not."""
  del unused
  reason = dispatch.needs_wgmma()
  if reason:
    return reason
  return None if x is None else unfit(x, B, chunk_size)


def unfit(x, B, chunk_size=None) -> str | None:
  """Returns None if the kernels take these shapes and dtypes, else why not."""
  if x.dtype != jnp.bfloat16:
    return f"needs bfloat16, x is {x.dtype}"
  p, n = x.shape[3], B.shape[3]
  if -p % CHANNELS > p:
    return f"needs heads of at least {CHANNELS // 2} channels, x is {x.shape}"
  if not STATE_SIZES[0] // 2 <= n <= STATE_SIZES[-1]:
    sizes = f"{STATE_SIZES[0] // 2} to {STATE_SIZES[-1]}"
    return f"needs a state size of {sizes}, B is {B.shape}"
  if chunk_size not in (None, CHUNK):
    return f"runs in chunks of {CHUNK}, chunk_size is {chunk_size}"
  return None


def forward(
  x, log_decay, dt, B, C, initial_state, D, z, *,
  chunk_size=None, interpret=False, config=None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Implements `ssd` on Hopper; arguments as in `ops.ssd.api.apply`.

  The skip is fused, the gate is plain JAX. Where channels and states do not
  fill the kernels' tiles, zeros stand beside them, which costs a copy.
  `interpret` is False or `InterpretGPUParams`; `config` is by default that of
  `configure`.
  """
  if reason := unfit(x, B, chunk_size):
    raise ValueError(f"ssd: the Mosaic GPU kernel {reason}")
  own = x.shape[3], B.shape[3]
  more = (
    -own[0] % CHANNELS,
    min(size for size in STATE_SIZES if size >= own[1]) - own[1],
  )
  x, B, C = _append(x, more[0]), _append(B, more[1]), _append(C, more[1])
  if initial_state is not None:
    initial_state = _append(initial_state, *more)
  if D is not None and D.shape[1] > 1:
    D = _append(D, more[0])
  b, length, h, p = x.shape
  g, n = B.shape[2:]
  wide = p // CHANNELS
  config = config or configure(b, length, h * wide, g)

  def whole_chunks(v):
    padding = [(0, 0), (0, -length % CHUNK)] + [(0, 0)] * (v.ndim - 2)
    return jnp.pad(v, padding) if length % CHUNK else v

  def heads_first(v):
    return jnp.swapaxes(whole_chunks(jnp.repeat(v, wide, axis=2)), 1, 2)

  narrow = (b, h * wide, CHANNELS, n)
  y, state = scan(
    config,
    interpret,
    whole_chunks(x).reshape(b, -1, h * wide, CHANNELS),
    heads_first(log_decay),
    heads_first(dt),
    whole_chunks(B),
    whole_chunks(C),
    None if initial_state is None else initial_state.reshape(narrow),
    None if D is None else _split_heads(D, wide),
  )
  y = y.reshape(b, -1, h, p)[:, :length, :, : own[0]]
  if z is not None:
    gate = jax.nn.silu(z.astype(jnp.float32))
    y = (y.astype(jnp.float32) * gate).astype(x.dtype)
  return y, state.reshape(b, h, p, n)[:, :, : own[0], : own[1]]


def _append(array, *counts):
  """Appends so many zeros along each of the last axes."""
  if not any(counts):
    return array
  padding = [(0, 0)] * (array.ndim - len(counts))
  return jnp.pad(array, padding + [(0, count) for count in counts])


def _split_heads(D, wide):
  """D, (H, P) or (H, 1), of heads of CHANNELS."""
  if D.shape[1] == 1:
    return jnp.repeat(D, wide, axis=0)
  return D.reshape(-1, CHANNELS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan(config, interpret, x, log_decay, dt, B, C, initial, D):
  """Returns y and the last state of whole chunks, heads of CHANNELS.

  log_decay and dt are (B, H, L). Gradients keep the result of `chunk_decays` of
  them, 12 bytes a token and head beside the 128 of x.
  """
  return _scan(config, interpret, x, log_decay, dt, B, C, initial, D)[0]


# Compiled by themselves, so that many layers lower their kernels once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(config, interpret, x, log_decay, dt, B, C, initial, D):
  decays = mosaic_gpu_decays.chunk_decays(log_decay, dt, interpret=interpret)
  starts = None if initial is None else initial[:, None]
  if config.segments > 1:
    starts, _ = mosaic_gpu_states.segment_starts(
      x, B, decays, initial, config=config, interpret=interpret
    )
  results = mosaic_gpu_forward.scan(
    x, decays, B, C, starts, D, config=config, interpret=interpret
  )
  return results, (x, decays, B, C, initial, D)


def _push(config, interpret, *primals):
  arrays = (None if v is None else v.value for v in primals)
  return _scan(config, interpret, *arrays)


def _pull(config, interpret, residuals, cotangents):
  """Without a gradient of the last state the walk back begins with none."""
  dy, dstate = cotangents
  if isinstance(dy, SymbolicZero):
    dy = jnp.zeros(dy.shape, dy.dtype)
  if isinstance(dstate, SymbolicZero):
    dstate = None
  return _gradients(config, interpret, residuals, dy, dstate)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(config, interpret, residuals, dy, dstate):
  return mosaic_gpu_backward.gradients(
    *residuals, dy, dstate, config=config, interpret=interpret
  )


scan.defvjp(_push, _pull, symbolic_zeros=True)
