"""A few tokens of the causal convolution, for decoding."""

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.causal_conv1d import api, xla
from ops.quantized import QState, QTensor, as_array

IMPLEMENTATIONS = dispatch.XLA_ONLY

# Up to so many tokens the loop over a rounded state is laid out flat.
UNROLL = 8


def causal_conv1d_step(
  x: jax.Array | QTensor,
  weight: jax.Array | QTensor,
  bias: jax.Array | QTensor | None,
  state: jax.Array | QState,
  *,
  activation: str | None = None,
  return_all_states: bool = False,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | QState]:
  """Takes T more tokens; T calls with one token equal one call with T.

  The equation is that of `causal_conv1d`, of which this is
  `causal_conv1d(x, weight, bias, initial_state=state, return_final_state=True)`
  with a state after every token where it is asked for.

  Args:
    x: (B, T, D), T of at least 1 and small, bfloat16 or float32; sums and SiLU
      are float32. A QTensor, as of weight and bias, is first dequantized.
    weight: (D, K), the tap of the current token last.
    bias: (D,), or None.
    state: The last K-1 inputs, oldest first, (B, K-1, D); of a `QState` all are
      rounded again after every token, which changes those that are on its
      levels by no more than the rounding of their scale.
    activation: "silu", or None.
    return_all_states: Return the state after each token, so that a caller can
      go back to any of them.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    y, (B, T, D) in x's dtype, and the new state, kept as the old one:
    (B, K-1, D), or (B, T, K-1, D) with `return_all_states`.

  Raises:
    ValueError: shapes or activation do not fit.
  """
  x, weight, bias = (as_array(v) for v in (x, weight, bias))
  api.check("causal_conv1d_step", x, weight, bias, state, activation)
  dispatch.resolve("causal_conv1d_step", IMPLEMENTATIONS, implementation, x)
  if isinstance(state, QState):
    return _rounded_steps(x, weight, bias, state, activation, return_all_states)
  before = state.astype(x.dtype)
  y = xla.convolve(x, weight, bias, before, None, activation == "silu")
  taps, tokens = state.shape[1], x.shape[1]
  inputs = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
  if not return_all_states:
    return y, inputs[:, tokens:]
  windows = [inputs[:, t + 1 : t + 1 + taps] for t in range(tokens)]
  return y, jnp.stack(windows, axis=1)


def _rounded_steps(x, weight, bias, state, activation, return_all_states):
  """The same with a state that is rounded behind every token."""

  def step(kept, token):
    y, new = causal_conv1d_step(
      token[:, None], weight, bias, kept.read(), activation=activation
    )
    new = kept.write(new)
    return new, (y[:, 0], new if return_all_states else None)

  state, (y, states) = jax.lax.scan(
    step, state, jnp.moveaxis(x, 1, 0), unroll=UNROLL
  )
  if return_all_states:
    state = jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), states)
  return jnp.moveaxis(y, 0, 1), state
