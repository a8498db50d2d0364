"""How many items a share of a total keeps."""

import jax
import jax.numpy as jnp

# Shares such as 0.1 are not exact in floating point; without the slack
# 0.1 * 520 = 52.000000x would be rounded up to 53.
_SLACK = 1e-3


def ceil_share(share: jax.Array, total: jax.Array | int) -> jax.Array:
  """Returns `ceil(share * total)`, free of floating-point noise.

  The result is `ceil(share * total - 1e-3)`, computed in float32 and exact for
  shares given to three decimals and totals up to about 100,000.

  Args:
    share: Shares, (...), any float dtype or a Python float.
    total: Totals, a Python int or an array that broadcasts against `share`.

  Returns:
    Counts, (...), int32.
  """
  share = jnp.asarray(share, jnp.float32)
  total = jnp.asarray(total).astype(jnp.float32)
  return jnp.ceil(share * total - _SLACK).astype(jnp.int32)
