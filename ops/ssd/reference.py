"""The specification of `ssd`: a loop over tokens in float64."""

import numpy as np


def ssd_reference(
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
  initial_state=None,
  return_final_state=False,
  segment_ids=None,
):
  """The recurrence of `ssd` in float64 NumPy, one token after the other."""
  x, dt, A, B, C = (np.asarray(v, np.float64) for v in (x, dt, A, B, C))
  batch, length, h, p = x.shape
  B, C = (np.repeat(v, h // v.shape[2], axis=2) for v in (B, C))
  if dt_bias is not None:
    dt = dt + np.asarray(dt_bias, np.float64)
  if dt_softplus:
    dt = np.logaddexp(0, dt)
  ids = np.zeros((batch, length)) if segment_ids is None else segment_ids
  state = np.zeros((batch, h, p, B.shape[-1]))
  if initial_state is not None:
    state += np.asarray(initial_state, np.float64)
  y = np.zeros_like(x)
  for b in range(batch):
    last = None
    for t in range(length):
      if ids[b, t] < 0:
        continue
      if last is not None and ids[b, t] != last:
        state[b] = 0
      last = ids[b, t]
      decay = np.exp(dt[b, t] * A)[:, None, None]
      update = np.einsum("h,hp,hn->hpn", dt[b, t], x[b, t], B[b, t])
      state[b] = decay * state[b] + update
      y[b, t] = np.einsum("hpn,hn->hp", state[b], C[b, t])
      if D is not None:
        y[b, t] += np.asarray(D, np.float64).reshape(h, -1) * x[b, t]
      if z is not None:
        gate = np.asarray(z[b, t], np.float64)
        y[b, t] *= gate * np.exp(-np.logaddexp(0, -gate))
  return (y, state) if return_final_state else y
