"""`selective_scan_step`: the recurrence for a few tokens, state in and out."""

import jax
import jax.numpy as jnp
from jax import lax

from ops import dispatch
from ops.quantized import QState, QTensor, as_array, like
from ops.selective_scan.api import check

IMPLEMENTATIONS = dispatch.XLA_ONLY

# Up to so many tokens the loop is laid out flat: one kernel, one pass over the
# state.
UNROLL = 8


def selective_scan_step(
  x: jax.Array | QTensor,
  dt: jax.Array | QTensor,
  A: jax.Array,
  B: jax.Array | QTensor,
  C: jax.Array | QTensor,
  state: jax.Array | QState,
  *,
  D: jax.Array | None = None,
  z: jax.Array | QTensor | None = None,
  dt_bias: jax.Array | None = None,
  dt_softplus: bool = False,
  return_all_states: bool = False,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | QState]:
  """Advances `selective_scan` by a few tokens, one after the other.

  The recurrence of `selective_scan` (https://arxiv.org/abs/2312.00752, equation
  2), for decoding; a long piece of a sequence is faster by `selective_scan`
  with `initial_state`.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t
    y_t = (C_t . h_t + D x_t) * silu(z_t)

  Args:
    x: (B, T, D), bfloat16 or float32, T >= 1 tokens. A QTensor, as of dt, B, C
      and z, is first dequantized.
    dt: (B, T, D), >= 0 after bias and softplus.
    A: (D, N), real, <= 0.
    B: (B, T, G, N); channel d reads group d // (D // G).
    C: (B, T, G, N).
    state: The state before the first token, (B, D, N); a `QState` is rounded
      again after every token.
    D: Skip, (D,).
    z: Gate, (B, T, D).
    dt_bias: Added to dt, (D,).
    dt_softplus: Whether softplus follows.
    return_all_states: Whether to return the state after every token, to roll
      back to the last accepted one.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    y, (B, T, D) in x's dtype, and the last state, (B, D, N), kept as
    `state` is, an array in float32; with `return_all_states` the states
    (B, T, D, N). All sums are float32.

  Raises:
    ValueError: Shapes do not fit each other, or `implementation` does not run.
  """
  x, dt, B, C, z = (as_array(v) for v in (x, dt, B, C, z))
  check("selective_scan_step", x, dt, A, B, C, D, z, dt_bias, state)
  dispatch.resolve("selective_scan_step", IMPLEMENTATIONS, implementation)
  f32 = lambda v: v.astype(jnp.float32)
  spread = lambda v: jnp.repeat(f32(v), x.shape[2] // v.shape[2], axis=2)
  A, dt = f32(A), f32(dt)
  if dt_bias is not None:
    dt = dt + f32(dt_bias)[None, None]
  if dt_softplus:
    dt = jax.nn.softplus(dt)

  # An array is carried in float32, whatever its dtype.
  state = state if isinstance(state, QState) else f32(state)

  def step(kept, token):
    dt, u, B, C = token
    decay = jnp.exp(dt[..., None] * A[None])
    state = decay * as_array(kept) + u[..., None] * B
    y = jnp.sum(state * C, axis=-1)
    state = like(state, kept)
    return state, (y, state if return_all_states else None)

  tokens = dt, f32(x) * dt, spread(B), spread(C)
  tokens = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), tokens)
  state, (y, states) = lax.scan(step, state, tokens, unroll=UNROLL)
  y = jnp.moveaxis(y, 0, 1)
  if D is not None:
    y = y + f32(D)[None, None] * f32(x)
  if z is not None:
    y = y * jax.nn.silu(f32(z))
  if return_all_states:
    state = jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), states)
  return y.astype(x.dtype), state
