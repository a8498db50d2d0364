"""`ssd_step`: the recurrence of `ssd` for a few tokens and a carried state."""

import jax
import jax.numpy as jnp
from jax import lax

from ops import dispatch
from ops.quantized import QState, QTensor, as_array, like
from ops.ssd.api import activate, check_shapes

IMPLEMENTATIONS = dispatch.XLA_ONLY

# Up to so many tokens the loop is laid out flat: one kernel, one pass over the
# state.
UNROLL = 8


def ssd_step(
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
  """Advances `ssd` by a few tokens, one after the other.

  The recurrence of `ssd` (https://arxiv.org/abs/2405.21060, equation 16), for
  decoding; a long piece of a sequence is faster by `ssd` with `initial_state`.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
    y_t = (h_t C_t + D x_t) * silu(z_t)

  Args:
    x: (B, T, H, P), bfloat16 or float32, T >= 1 tokens. A QTensor, as of dt, B,
      C and z, is first dequantized.
    dt: (B, T, H), >= 0 after bias and softplus.
    A: (H,), real, <= 0.
    B: (B, T, G, N); head h reads group h // (H // G).
    C: (B, T, G, N).
    state: The state before the first token, (B, H, P, N); a `QState` is rounded
      again after every token.
    D: Skip, (H,) or (H, P).
    z: Gate, (B, T, H, P).
    dt_bias: Added to dt, (H,).
    dt_softplus: Whether softplus follows.
    return_all_states: Whether to return the state after every token, to roll
      back to the last accepted one.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    y, (B, T, H, P) in x's dtype, and the last state, (B, H, P, N), kept as
    `state` is, an array in float32; with `return_all_states` the states
    (B, T, H, P, N). All sums are float32.

  Raises:
    ValueError: Shapes do not fit each other, or `implementation` does not run.
  """
  x, dt, B, C, z = (as_array(v) for v in (x, dt, B, C, z))
  check_shapes("ssd_step", x, dt, A, B, C, D, z, dt_bias, state)
  dispatch.resolve("ssd_step", IMPLEMENTATIONS, implementation)
  h, p = x.shape[2:]
  f32 = lambda v: v.astype(jnp.float32)
  spread = lambda v: jnp.repeat(f32(v), h // v.shape[2], axis=2)
  dt = activate(f32(dt), dt_bias, dt_softplus)
  decay = jnp.exp(dt * f32(A)[None, None])

  # An array is carried in float32, whatever its dtype.
  state = state if isinstance(state, QState) else f32(state)

  def step(kept, token):
    decay, xdt, B, C = token
    update = xdt[..., None] * B[:, :, None]
    state = decay[..., None, None] * as_array(kept) + update
    y = jnp.sum(state * C[:, :, None], axis=-1)
    state = like(state, kept)
    return state, (y, state if return_all_states else None)

  tokens = decay, f32(x) * dt[..., None], spread(B), spread(C)
  tokens = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), tokens)
  state, (y, states) = lax.scan(step, state, tokens, unroll=UNROLL)
  y = jnp.moveaxis(y, 0, 1)
  if D is not None:
    D = jnp.broadcast_to(f32(D).reshape(h, -1), (h, p))
    y = y + D[None, None] * f32(x)
  if z is not None:
    y = y * jax.nn.silu(f32(z))
  if return_all_states:
    state = jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), states)
  return y.astype(x.dtype), state
