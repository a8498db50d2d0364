"""Ops as one would write them in plain JAX: peers that are always there."""

import jax
import jax.numpy as jnp
from jax import lax


def selective_scan(arrays: dict[str, jax.Array]) -> jax.Array:
  """Token after token by `jax.lax.scan`, for one group."""
  x, z = arrays["x"], arrays["z"]
  f32 = lambda name: arrays[name].astype(jnp.float32)
  dt = jax.nn.softplus(f32("dt") + f32("dt_bias")[None, None])
  A = f32("A")

  def step(state, token):
    x, dt, B, C = token
    decay = jnp.exp(dt[..., None] * A[None])
    state = decay * state + (dt * x)[..., None] * B[:, None, :]
    return state, jnp.einsum("bdn,bn->bd", state, C)

  tokens = f32("x"), dt, f32("B")[:, :, 0], f32("C")[:, :, 0]
  tokens = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), tokens)
  _, y = lax.scan(step, jnp.zeros((x.shape[0], *A.shape)), tokens)
  y = jnp.moveaxis(y, 0, 1) + f32("D")[None, None] * f32("x")
  return (y * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)


def ssd(arrays: dict[str, jax.Array]) -> jax.Array:
  """Token after token by `jax.lax.scan`, for one group."""
  x = arrays["x"]
  f32 = lambda name: arrays[name].astype(jnp.float32)
  dt = jax.nn.softplus(f32("dt") + f32("dt_bias")[None, None])
  A = f32("A")

  def step(state, token):
    x, dt, B, C = token
    decay = jnp.exp(dt * A[None])[..., None, None]
    state = decay * state + jnp.einsum("bhp,bn->bhpn", dt[..., None] * x, B)
    return state, jnp.einsum("bhpn,bn->bhp", state, C)

  tokens = f32("x"), dt, f32("B")[:, :, 0], f32("C")[:, :, 0]
  tokens = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), tokens)
  shape = (x.shape[0], *x.shape[2:], arrays["B"].shape[-1])
  _, y = lax.scan(step, jnp.zeros(shape), tokens)
  y = jnp.moveaxis(y, 0, 1) + f32("D")[None, None, :, None] * f32("x")
  return y.astype(x.dtype)


def causal_conv1d(arrays: dict[str, jax.Array]) -> jax.Array:
  """`jax.lax.conv_general_dilated` with one channel a group, and SiLU."""
  x, weight = arrays["x"], arrays["weight"].astype(arrays["x"].dtype)
  y = lax.conv_general_dilated(
    x,
    jnp.transpose(weight)[:, None, :],
    (1,),
    [(weight.shape[1] - 1, 0)],
    dimension_numbers=("NWC", "WIO", "NWC"),
    feature_group_count=x.shape[-1],
  )
  y = y.astype(jnp.float32) + arrays["bias"][None, None]
  return jax.nn.silu(y).astype(x.dtype)


def gated_rms_norm(arrays: dict[str, jax.Array], eps: float) -> jax.Array:
  """Its formula in float32, whose values are kept for the backward pass."""
  x, gate, scale = (
    arrays[name].astype(jnp.float32) for name in ("x", "gate", "scale")
  )
  value = x * jax.nn.silu(gate)
  mean = jnp.mean(jnp.square(value), axis=-1, keepdims=True)
  normed = value * jax.lax.rsqrt(mean + eps) * scale[None, None]
  return normed.astype(arrays["x"].dtype)


def token_logprob(arrays: dict[str, jax.Array]) -> jax.Array:
  """`jax.nn.log_softmax` of all logits."""
  logits = jnp.einsum(
    "ble,ve->blv",
    arrays["hidden"],
    arrays["weight"],
    preferred_element_type=jnp.float32,
  )
  picked = jnp.take_along_axis(
    jax.nn.log_softmax(logits), arrays["targets"][..., None], axis=-1
  )
  return picked[..., 0]


def fourier_mix(arrays: dict[str, jax.Array]) -> jax.Array:
  """The complex transform of both axes in float32, of which half is left."""
  x = arrays["x"]
  y = jnp.fft.fftn(x.astype(jnp.float32), axes=(-2, -1))
  return y.real.astype(x.dtype)


def chunked_attention(arrays: dict[str, jax.Array], window: int) -> jax.Array:
  """Attention with a mask of all pairs, for chunk keys of last tokens."""
  q, ends = arrays["q"], arrays["ends"]
  slots = jnp.arange(q.shape[1])
  far = slots[:, None] - slots[None]
  closed = jnp.any(ends[:, :, None] == slots[None, None], axis=1)
  seen = (far >= 0)[None] & ((far <= window)[None] | closed[:, None])
  return jax.nn.dot_product_attention(
    q, arrays["k"], arrays["v"], mask=seen[:, None]
  )


def causal_attention(
  arrays: dict[str, jax.Array], window: int | None = None
) -> jax.Array:
  """Attention to all tokens in front, or to a window; cuDNN's on a GPU."""
  q = arrays["q"]
  fits = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16
  return jax.nn.dot_product_attention(
    q,
    arrays["k"],
    arrays["v"],
    is_causal=True,
    local_window_size=None if window is None else (window, 0),
    implementation="cudnn" if fits else "xla",
  )


def token_attention(
  arrays: dict[str, jax.Array], implementation: str
) -> jax.Array:
  """Attention of one token a row to the whole of a cache that is full."""
  return jax.nn.dot_product_attention(
    arrays["q"][:, None],
    arrays["keys"],
    arrays["values"],
    implementation=implementation,
  )[:, 0]
