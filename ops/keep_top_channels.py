"""Magnitude pruning of the channels of each token."""

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch
from ops.ceil_share import ceil_share
from ops.top_mask import top_mask

IMPLEMENTATIONS = dispatch.XLA_ONLY


def keep_top_channels(
  x: jax.Array,
  keep: jax.Array | float,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Zeros all but the largest `ceil(keep * D)` channels of each token.

  Contextual activation sparsity, as TEAL (https://arxiv.org/abs/2408.14690)
  and SOL (https://arxiv.org/abs/2605.10875) use it, with an exact count in
  place of a calibrated threshold:

    y_d = x_d if |x_d| >= (the ceil(keep * D)-th largest |x|) else 0

  Channels tied with the threshold are kept. `keep >= 1` is the identity.
  The speed of the selection is discussed in `ops.top_mask`.

  Args:
    x: Activations without NaN, (..., D), any float dtype.
    keep: Share of channels to keep, in (0, 1]; at least one channel is kept.
      A scalar, or an array that broadcasts against `x` without D.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    (..., D) in the dtype of `x`. The gradient passes through kept channels.

  Raises:
    ValueError: `keep` is a Python number outside (0, 1].
  """
  if isinstance(keep, (int, float)) and not 0 < keep <= 1:
    raise ValueError(
      f"keep_top_channels: keep is {keep}, but must be in (0, 1]"
    )
  dispatch.resolve("keep_top_channels", IMPLEMENTATIONS, implementation)
  return _keep_top_channels(x, keep)


def _keep_top_channels(x: jax.Array, keep: jax.Array | float) -> jax.Array:
  count = jnp.maximum(ceil_share(keep, x.shape[-1]), 1)
  mask = top_mask(jnp.abs(x), jnp.broadcast_to(count, x.shape[:-1]))
  return jnp.where(mask, x, jnp.zeros((), x.dtype))


def keep_top_channels_reference(x: np.ndarray, keep: np.ndarray) -> np.ndarray:
  """The specification in float64; arrays as in `keep_top_channels`."""
  x = np.asarray(x, np.float64)
  keep = np.broadcast_to(np.asarray(keep, np.float64), x.shape[:-1])
  out = np.zeros_like(x)
  for token in np.ndindex(*x.shape[:-1]):
    count = max(int(np.ceil(keep[token] * x.shape[-1] - 1e-3)), 1)
    sizes = np.abs(x[token])
    for d, size in enumerate(sizes):
      if np.sum(sizes > size) < count:
        out[token][d] = x[token][d]
  return out
