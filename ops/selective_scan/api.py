"""`selective_scan`: checks, padding and choice of the implementation."""

import importlib
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ops import dispatch, segments, sharding
from ops.quantized import QState, QTensor, as_array

# The kernel that was measured to be faster (experiments/results) is in front of
# "xla", the others stand behind it.
IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.kernel(
      "ops.selective_scan.mosaic_gpu", dispatch.needs_hopper
    ),
    "xla": dispatch.always,
    "mosaic_tpu": dispatch.kernel(
      "ops.selective_scan.mosaic_tpu", dispatch.needs_tpu
    ),
  }
)


def selective_scan(
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
  initial_state: jax.Array | QState | None = None,
  return_final_state: bool = False,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Scans a sequence with Mamba's selective state space.

  Mamba (https://arxiv.org/abs/2312.00752, equation 2 and algorithm 2), for each
  row and channel, with N decays a channel that depend on the token:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t          h is (N,)
    y_t = (C_t . h_t + D x_t) * silu(z_t)

  The equivalent plain JAX is a `lax.scan` of the two lines over tokens.

  Args:
    x: (B, L, D), bfloat16 or float32, any L >= 1. A QTensor, as of dt, B, C and
      z, is first dequantized to the dtype that it stands for.
    dt: Step sizes, (B, L, D), >= 0 after bias and softplus.
    A: (D, N), real, <= 0.
    B: (B, L, G, N); channel d reads group d // (D // G).
    C: (B, L, G, N).
    D: Skip, (D,).
    z: Gate, (B, L, D).
    dt_bias: Added to dt, (D,).
    dt_softplus: Whether softplus follows.
    initial_state: State before the first token, (B, D, N). With `segment_ids`
      it belongs to the first segment of the row.
    return_final_state: Whether to return the last state too.
    segment_ids: (B, L) int32 of packed or padded rows, see `ops.segments`: a
      negative id is padding, which may stand around segments but not inside.
    implementation: `"xla"`, `"mosaic_gpu"`, `"mosaic_tpu"`, or None for the
      best that runs here.

  Returns:
    y, (B, L, D) in x's dtype, or (y, state) with the state after the last token
    that is not padding, (B, D, N) float32. Everything is computed in float32.
    Exponentials are of dt A alone, so no dt or A <= 0 overflows. Gradients flow
    to all arrays. Memory beyond arguments and results is of the order of
    B (L/Q + Q) D N float32 for chunks of Q tokens, also for gradients.

  Raises:
    ValueError: Shapes do not fit each other, or `implementation` does not run.
  """
  x, dt, B, C, z = (as_array(v) for v in (x, dt, B, C, z))
  initial_state = as_array(initial_state)
  check("selective_scan", x, dt, A, B, C, D, z, dt_bias, initial_state)
  segments.check("selective_scan", segment_ids, *x.shape[:2])
  if sharding.sizes():
    sharded = importlib.import_module("ops.selective_scan.sharded")
    return sharded.selective_scan(
      selective_scan,
      {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z,
       "dt_bias": dt_bias, "initial_state": initial_state,
       "segment_ids": segment_ids},
      dt_softplus=dt_softplus,
      return_final_state=return_final_state,
      implementation=implementation,
    )  # fmt: skip
  arrays = (x, dt, A, B, C, D, z, dt_bias, initial_state)
  name = dispatch.resolve(
    "selective_scan",
    IMPLEMENTATIONS,
    implementation,
    *arrays,
    dt_softplus=dt_softplus,
  )
  module = importlib.import_module(f"ops.selective_scan.{name}")
  y, state = apply(
    module.selective_scan, arrays, segment_ids, dt_softplus=dt_softplus
  )
  return (y, state) if return_final_state else y


def apply(
  scan: Callable, arrays, segment_ids, *, dt_softplus
) -> tuple[jax.Array, jax.Array]:
  """Calls an implementation `scan(*arrays, marks, dt_softplus=...)`.

  Bias, softplus, skip, gate and resets are fused in every implementation. They
  learn of packed and padded rows by `marks`, (B, L) int32: 1 resets the state
  in front of a token, 2 is padding, which is zero in x, dt, B, C and z.

  Args:
    scan: The implementation. Returns y, (B, L, D) in x's dtype, and the final
      state, (B, D, N) float32.
    arrays: x, dt, A, B, C, D, z, dt_bias and initial_state, None if not given.
    segment_ids: (B, L) int32 or None.
    dt_softplus: As in `selective_scan`.

  Returns:
    y and the final state.
  """
  if segment_ids is None:
    return scan(*arrays, None, dt_softplus=dt_softplus)
  x, dt, A, B, C, D, z, dt_bias, initial_state = arrays
  x, dt, B, C = (segments.zero_padding(v, segment_ids) for v in (x, dt, B, C))
  z = None if z is None else segments.zero_padding(z, segment_ids)
  marks = jnp.where(
    segments.is_padding(segment_ids),
    2,
    segments.resets(segment_ids).astype(jnp.int32),
  )
  arrays = (x, dt, A, B, C, D, z, dt_bias, initial_state)
  return scan(*arrays, marks, dt_softplus=dt_softplus)


def check(op, x, dt, A, B, C, D, z, dt_bias, state):
  """Raises ValueError in the name of `op` unless all shapes fit x's and B's."""
  if x.ndim != 3 or B.ndim != 4:
    raise ValueError(
      f"{op}: x is {x.shape} and B is {B.shape}, not (B, L, D) and (B, L, G, N)"
    )
  batch, length, channels = x.shape
  groups, size = B.shape[2:]
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"{op}: x is {x.dtype}, not bfloat16 or float32")
  if not length:
    raise ValueError(f"{op}: x {x.shape} has no tokens")
  if not groups or channels % groups:
    raise ValueError(
      f"{op}: {channels} channels do not fall into {groups} groups"
    )
  wanted = {
    "dt": (dt, x.shape),
    "A": (A, (channels, size)),
    "B": (B, (batch, length, groups, size)),
    "C": (C, B.shape),
    "D": (D, (channels,)),
    "z": (z, x.shape),
    "dt_bias": (dt_bias, (channels,)),
    "state": (state, (batch, channels, size)),
  }
  for name, (value, shape) in wanted.items():
    if value is not None and value.shape != shape:
      raise ValueError(
        f"{op}: {name} is {value.shape}, but x {x.shape} and B {B.shape} need"
        f" {shape}"
      )
