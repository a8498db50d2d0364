"""`mamba2_step` in plain JAX: a scan over layers of the steps of other ops."""

import jax
import jax.numpy as jnp
from jax import lax

from ops.causal_conv1d import causal_conv1d_step
from ops.quantized import as_array, rounded
from ops.quantized_matmul import quantized_matmul
from ops.ssd import ssd_step


def forward(x, weights, conv_state, ssm_state, *, eps):
  """Implements `mamba2_step`; arguments as there."""

  def layer(carry, weights_and_index):
    x, states = carry
    w, index = weights_and_index
    state = jax.tree.map(
      lambda s: lax.dynamic_index_in_dim(s, index, keepdims=False), states
    )
    y, state = mixer(w, x, *state, eps=eps)
    # All is read before anything is written: XLA would else keep the old
    # states by copying those of all layers, in every layer.
    y, state = lax.optimization_barrier((y, state))
    states = jax.tree.map(
      lambda s, new: lax.dynamic_update_index_in_dim(s, new, index, 0),
      states,
      tuple(state),
    )
    return (x + y.astype(jnp.float32), states), None

  carry = x.astype(jnp.float32), (conv_state, ssm_state)
  indices = jnp.arange(conv_state.shape[0], dtype=jnp.int32)
  (x, states), _ = lax.scan(layer, carry, (weights, indices))
  return x, *states


def mixer(w, x, conv_state, ssm_state, *, eps):
  """What one layer adds to x, (B, D), and its states (B, K-1, C), (B, H, P, N).

  `w` are weights without the axis L.
  """
  dtype, (b, h, p, n) = conv_state.dtype, ssm_state.shape
  e, channels = h * p, conv_state.shape[-1]
  groups = (channels - e) // (2 * n)
  low = lambda v: v.astype(dtype)
  f32 = lambda v: v.astype(jnp.float32)
  normed = low(_rmsnorm(x, eps) * f32(w.norm)[None])
  projected = quantized_matmul(normed, w.in_proj)
  ends = [e, 2 * e, e + channels]
  z, s, BC, dt = jnp.split(projected, ends, axis=-1)
  parts = rounded(s, w.taps.conv_x), rounded(BC, w.taps.conv_BC)
  new = jnp.concatenate([as_array(part) for part in parts], axis=-1)
  new, conv_state = causal_conv1d_step(
    new[:, None],
    low(as_array(w.conv_weight)),
    low(w.conv_bias),
    conv_state,
    activation="silu",
  )
  s, B, C = jnp.split(new, [e, e + groups * n], axis=-1)
  y, ssm_state = ssd_step(
    rounded(s.reshape(b, 1, h, p), w.taps.x),
    rounded(dt[:, None], w.taps.dt),
    -jnp.exp(f32(w.A_log)),
    rounded(B.reshape(b, 1, groups, n), w.taps.B),
    rounded(C.reshape(b, 1, groups, n), w.taps.C),
    ssm_state,
    D=f32(w.D),
    dt_bias=f32(w.dt_bias),
    dt_softplus=True,
  )
  y = as_array(rounded(y.reshape(b, e), w.taps.y))
  z = as_array(rounded(z, w.taps.z))
  gated = f32(y.reshape(b, groups, -1)) * jax.nn.silu(
    f32(z.reshape(b, groups, -1))
  )
  normed = _rmsnorm(gated, eps).reshape(b, e) * f32(w.gated_norm)[None]
  y = quantized_matmul(low(normed), w.out_proj)
  return y, (conv_state, ssm_state)


def _rmsnorm(x, eps):
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * lax.rsqrt(mean_square + eps)
