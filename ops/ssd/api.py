"""`ssd`: checks, preprocessing and choice of the implementation."""

import importlib
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ops import dispatch, segments, sharding
from ops.quantized import QState, QTensor, as_array

# exp(-128) is exactly 0 in float32: as a log decay it forgets the state, so a
# lower one changes nothing, and sums within a chunk stay bounded.
FORGET = -128.0


# The kernel that was measured to be faster (experiments/results) is in front of
# "xla", the others stand behind it.
IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.kernel("ops.ssd.mosaic_gpu", dispatch.needs_hopper),
    "xla": dispatch.always,
    "mosaic_tpu": dispatch.kernel("ops.ssd.mosaic_tpu", dispatch.needs_tpu),
  }
)


def ssd(
  x: jax.Array | QTensor,
  dt: jax.Array | QTensor,
  A: jax.Array,
  B: jax.Array | QTensor,
  C: jax.Array | QTensor,
  *,
  D: jax.Array | None = None,
  z: jax.Array | QTensor | None = None,
  dt_bias: jax.Array | None = None,
  dt_softplus: bool = False,
  chunk_size: int | None = None,
  initial_state: jax.Array | QState | None = None,
  return_final_state: bool = False,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Scans a sequence by Mamba-2's state-space duality, in chunks.

  Structured state-space duality (https://arxiv.org/abs/2405.21060, section 6),
  for each row and head, with a scalar A a head:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h is (P, N)
    y_t = (h_t C_t + D x_t) * silu(z_t)

  Inside a chunk it is a masked matrix product, between chunks a recurrence.
  The equivalent plain JAX is a `lax.scan` of the two lines over tokens.

  Args:
    x: (B, L, H, P), bfloat16 or float32, any L >= 1. A QTensor, as of dt, B, C
      and z, is first dequantized to the dtype that it stands for.
    dt: Step sizes, (B, L, H), >= 0 after bias and softplus.
    A: (H,), real, <= 0.
    B: (B, L, G, N); head h reads group h // (H // G).
    C: (B, L, G, N).
    D: Skip, (H,) or (H, P).
    z: Gate, (B, L, H, P).
    dt_bias: Added to dt, (H,).
    dt_softplus: Whether softplus follows.
    chunk_size: Tokens a chunk, by default fit to the shapes.
    initial_state: State before the first token, (B, H, P, N). With
      `segment_ids` it belongs to the first segment of the row.
    return_final_state: Whether to return the last state too.
    segment_ids: (B, L) int32 of packed or padded rows, see `ops.segments`: a
      negative id is padding, which may stand around segments but not inside.
    implementation: `"xla"`, `"mosaic_gpu"`, `"mosaic_tpu"`, or None for the
      best that runs here.

  Returns:
    y, (B, L, H, P) in x's dtype, or (y, state) with the state after the last
    token that is not padding, (B, H, P, N) float32. B, C and z are read in x's
    dtype; products of matrices take it and sum in float32; dt, decays and
    states are float32. Decays are never inverted, so no dt or A <= 0 overflows.
    Memory beyond the arguments is of the order of B L H (P + Q) + B (L/Q) H P N
    for chunks of Q tokens, also for gradients.

  Raises:
    ValueError: Shapes do not fit each other, or `implementation` does not run.
  """
  x, dt, B, C, z = (as_array(v) for v in (x, dt, B, C, z))
  initial_state = as_array(initial_state)
  _check(x, dt, A, B, C, D, z, dt_bias, initial_state, chunk_size)
  segments.check("ssd", segment_ids, *x.shape[:2])
  if sharding.sizes():
    sharded = importlib.import_module("ops.ssd.sharded")
    return sharded.ssd(
      ssd,
      {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z,
       "dt_bias": dt_bias, "initial_state": initial_state,
       "segment_ids": segment_ids},
      dt_softplus=dt_softplus,
      return_final_state=return_final_state,
      chunk_size=chunk_size,
      implementation=implementation,
    )  # fmt: skip
  name = dispatch.resolve(
    "ssd", IMPLEMENTATIONS, implementation, x, B, chunk_size=chunk_size
  )
  return apply(
    importlib.import_module(f"ops.ssd.{name}").forward,
    x,
    dt,
    A,
    B,
    C,
    D=D,
    z=z,
    dt_bias=dt_bias,
    dt_softplus=dt_softplus,
    chunk_size=chunk_size,
    initial_state=initial_state,
    return_final_state=return_final_state,
    segment_ids=segment_ids,
  )


def apply(
  forward: Callable,
  x,
  dt,
  A,
  B,
  C,
  *,
  D=None,
  z=None,
  dt_bias=None,
  dt_softplus=False,
  chunk_size=None,
  initial_state=None,
  return_final_state=False,
  segment_ids=None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Prepares the arguments in plain JAX and calls an implementation.

  Every implementation has the signature `forward(x, log_decay, dt, B, C,
  initial_state, D, z, *, chunk_size) -> (y, state)`: log_decay and dt are
  (B, L, H) float32, D is (H, P) or (H, 1), B, C and z have x's dtype. Padding
  is zero in all of them and so leaves the state alone; log_decay is `FORGET` at
  the first token of a packed segment, so kernels need not know of segments.
  """
  # Before softplus, whose gradient at garbage would not be a number.
  dt = segments.zero_padding(dt, segment_ids).astype(jnp.float32)
  dt = activate(dt, dt_bias, dt_softplus)
  x, dt, B, C = (segments.zero_padding(v, segment_ids) for v in (x, dt, B, C))
  log_decay = jnp.maximum(dt * A.astype(jnp.float32)[None, None], FORGET)
  if segment_ids is not None:
    starts = segments.resets(segment_ids)[:, :, None]
    log_decay = jnp.where(starts, FORGET, log_decay)
  if D is not None:
    D = D.astype(jnp.float32).reshape(D.shape[0], -1)
  if initial_state is not None:
    initial_state = initial_state.astype(jnp.float32)
  B, C = B.astype(x.dtype), C.astype(x.dtype)
  z = None if z is None else z.astype(x.dtype)
  y, state = forward(
    x, log_decay, dt, B, C, initial_state, D, z, chunk_size=chunk_size
  )
  return (y, state) if return_final_state else y


def activate(dt, dt_bias, dt_softplus: bool):
  """Returns the step sizes: dt (..., H) with its bias and softplus."""
  if dt_bias is not None:
    bias = dt_bias.astype(jnp.float32)
    dt = dt + bias.reshape((1,) * (dt.ndim - 1) + bias.shape)
  return jax.nn.softplus(dt) if dt_softplus else dt


def _check(x, dt, A, B, C, D, z, dt_bias, initial_state, chunk_size):
  check_shapes("ssd", x, dt, A, B, C, D, z, dt_bias, initial_state)
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"ssd: chunk_size is {chunk_size}, it must be at least 1")


def check_shapes(op, x, dt, A, B, C, D, z, dt_bias, state):
  """Raises ValueError in the name of `op` unless all shapes fit x's and B's."""
  if x.ndim != 4 or B.ndim != 4:
    raise ValueError(
      f"{op}: x is {x.shape} and B is {B.shape}, not (B, L, H, P) and"
      " (B, L, G, N)"
    )
  b, length, h, p = x.shape
  g, n = B.shape[2:]
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"{op}: x is {x.dtype}, not bfloat16 or float32")
  if not length:
    raise ValueError(f"{op}: x {x.shape} has no tokens")
  if not g or h % g:
    raise ValueError(f"{op}: {h} heads do not fall into {g} groups")
  wanted = {
    "dt": (dt, (b, length, h)),
    "A": (A, (h,)),
    "B": (B, (b, length, g, n)),
    "C": (C, (b, length, g, n)),
    "D": (D, (h,) if D is not None and D.ndim == 1 else (h, p)),
    "z": (z, x.shape),
    "dt_bias": (dt_bias, (h,)),
    "state": (state, (b, h, p, n)),
  }
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(
        f"{op}: {name} is {value.shape}, but x {x.shape} and B {B.shape} need"
        f" {shape}"
      )
