"""The specification of `mamba2_step`: a loop over layers in float64."""

import numpy as np


def mamba2_step_reference(x, weights, conv_state, ssm_state, *, eps):
  """The equations of `mamba2_step` in float64 NumPy, layer by layer.

  Nothing is quantized here.
  """
  exact = lambda v: np.asarray(v, np.float64)
  x, conv_state, ssm_state = map(exact, (x, conv_state, ssm_state))
  conv_state, ssm_state = conv_state.copy(), ssm_state.copy()
  num_layers, batch, _, channels = conv_state.shape
  h, p, n = ssm_state.shape[2:]
  groups = (channels - h * p) // (2 * n)
  arrays = {n: stack for n, stack in vars(weights).items() if n != "taps"}
  for i in range(num_layers):
    w = {name: exact(stack[i]) for name, stack in arrays.items()}
    projected = _rmsnorm(x, eps) * w["norm"] @ w["in_proj"]
    z, new, dt = np.split(projected, [h * p, h * p + channels], axis=1)
    inputs = np.concatenate([conv_state[i], new[:, None]], axis=1)
    conv_state[i] = inputs[:, 1:]
    mixed = np.einsum("bkc,ck->bc", inputs, w["conv_weight"]) + w["conv_bias"]
    s, B, C = np.split(_silu(mixed), [h * p, h * p + groups * n], axis=1)
    s = s.reshape(batch, h, p)
    B, C = (
      np.repeat(v.reshape(batch, groups, n), h // groups, axis=1)
      for v in (B, C)
    )
    dt = np.logaddexp(0, dt + w["dt_bias"])
    decay = np.exp(-dt * np.exp(w["A_log"]))
    update = np.einsum("bh,bhp,bhn->bhpn", dt, s, B)
    ssm_state[i] = decay[..., None, None] * ssm_state[i] + update
    y = np.einsum("bhpn,bhn->bhp", ssm_state[i], C) + w["D"][:, None] * s
    gated = (y.reshape(batch, h * p) * _silu(z)).reshape(batch, groups, -1)
    normed = _rmsnorm(gated, eps).reshape(batch, h * p) * w["gated_norm"]
    x = x + normed @ w["out_proj"]
  return x, conv_state, ssm_state


def _rmsnorm(x, eps):
  return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def _silu(x):
  return x * np.exp(-np.logaddexp(0, -x))
