"""The specification of the causal convolution, in float64."""

import numpy as np


def causal_conv1d_reference(
  x: np.ndarray,
  weight: np.ndarray,
  bias: np.ndarray | None = None,
  *,
  activation: str | None = None,
  initial_state: np.ndarray | None = None,
  return_final_state: bool = False,
  segment_ids: np.ndarray | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
  """The specification; arrays as in `causal_conv1d`, one token at a time."""
  x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
  batch, length, channels = x.shape
  taps = weight.shape[1] - 1
  state = np.zeros((batch, taps, channels))
  if initial_state is not None:
    state += np.asarray(initial_state, np.float64)
  y = np.zeros_like(x)
  for b in range(batch):
    segment = None
    for t in range(length):
      if segment_ids is not None:
        if segment_ids[b, t] < 0:
          continue
        if segment is not None and segment_ids[b, t] != segment:
          state[b] = 0
        segment = segment_ids[b, t]
      window = np.concatenate([state[b], x[b, t : t + 1]])
      out = np.sum(window * weight.T, axis=0)
      if bias is not None:
        out = out + np.asarray(bias, np.float64)
      y[b, t] = out / (1 + np.exp(-out)) if activation == "silu" else out
      state[b] = window[1:]
  return (y, state) if return_final_state else y
