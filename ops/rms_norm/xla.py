"""`rms_norm` in plain JAX; the backward pass keeps the inputs alone.

Else float32 intermediates would be most of what training keeps.
"""

import functools

import jax
import jax.numpy as jnp


def forward(
  x: jax.Array,
  scale: jax.Array,
  gate: jax.Array | None,
  residual: jax.Array | None,
  *,
  num_groups: int,
  eps: float,
  dtype: jnp.dtype,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Implements `rms_norm`; arguments as in `ops.rms_norm.api`."""
  if gate is not None:
    return _gated(x, gate, scale, num_groups, eps, dtype)
  if residual is None:
    return _plain(x, scale, num_groups, eps).astype(dtype)
  total = residual + x.astype(residual.dtype)
  return _plain(total, scale, num_groups, eps).astype(dtype), total


def _grouped(x, num_groups):
  return x.reshape(*x.shape[:-1], num_groups, -1) if num_groups > 1 else x


@functools.partial(jax.checkpoint, static_argnums=(2, 3), prevent_cse=False)
def _plain(x, scale, num_groups, eps):
  x32 = _grouped(x.astype(jnp.float32), num_groups)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
  normed = normed.reshape(x.shape)
  return normed * jnp.broadcast_to(scale.astype(x.dtype), normed.shape)


@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5), prevent_cse=False)
def _gated(x, z, scale, num_groups, eps, dtype):

  def gate(x, z):
    gated = x.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    return gated.reshape(*x.shape[:-1], num_groups, -1)

  mean_square = jnp.mean(jnp.square(gate(x, z)), axis=-1, keepdims=True)
  # Gated a second time: else XLA would write the float32 values to memory.
  grouped = gate(*jax.lax.optimization_barrier((x, z)))
  normed = (grouped * jax.lax.rsqrt(mean_square + eps)).reshape(x.shape)
  scale = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
  return (normed * scale).astype(dtype)
