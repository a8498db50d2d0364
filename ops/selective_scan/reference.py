"""The specification of `selective_scan`: a loop over tokens in float64."""

import numpy as np


def selective_scan_reference(
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
  """The recurrence of `selective_scan` in float64, token after token."""
  x, dt, A, B, C = (np.asarray(a, np.float64) for a in (x, dt, A, B, C))
  batch, length, channels = x.shape
  group = channels // B.shape[2]
  y = np.zeros_like(x)
  final = np.zeros((batch, *A.shape))
  if dt_bias is not None:
    dt = dt + np.asarray(dt_bias, np.float64)
  if dt_softplus:
    dt = np.logaddexp(dt, 0)
  for b in range(batch):
    h = np.zeros_like(A)
    if initial_state is not None:
      h = np.asarray(initial_state, np.float64)[b]
    current = None
    for t in range(length):
      if segment_ids is not None:
        segment = int(segment_ids[b, t])
        if segment < 0:
          continue
        if current is not None and segment != current:
          h = np.zeros_like(A)
        current = segment
      B_DN = np.repeat(B[b, t], group, axis=0)
      C_DN = np.repeat(C[b, t], group, axis=0)
      drive = (dt[b, t] * x[b, t])[:, None] * B_DN
      h = np.exp(dt[b, t][:, None] * A) * h + drive
      y[b, t] = (C_DN * h).sum(-1)
      if D is not None:
        y[b, t] += np.asarray(D, np.float64) * x[b, t]
      if z is not None:
        gate = np.asarray(z, np.float64)[b, t]
        y[b, t] *= gate * np.exp(-np.logaddexp(-gate, 0))
    final[b] = h
  return (y, final) if return_final_state else y
