"""The selective scan in plain JAX: chunk by chunk, for every platform.

The forward pass carries the state from chunk to chunk and keeps only the states
in front of each chunk; the backward pass recomputes those inside of a chunk. So
no (B, L, D, N) array exists. Exponentials are of dt A <= 0 alone.

States are (B, G, N, E) in here, with D = G E: channels lie innermost, where a
token's dt and x need no broadcast.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ops import dispatch
from ops.selective_scan import tuning

RESET, PADDING = 1, 2


@dataclasses.dataclass(frozen=True)
class _Options:
  dt_softplus: bool
  config: tuning.XlaConfig


def selective_scan(
  x,
  dt,
  A,
  B,
  C,
  D,
  z,
  dt_bias,
  initial_state,
  marks,
  *,
  dt_softplus,
  config=None,
):
  """Implements `selective_scan` on any device; see `api.apply`.

  `config` is by default that of the platform, `tuning.xla_config`.
  """
  batch, length, channels = x.shape
  groups, size = B.shape[2:]
  split = lambda a: a.reshape(*a.shape[:-1], groups, channels // groups)
  optional = lambda f, a: None if a is None else f(a)
  config = config or tuning.xla_config(dispatch.platform())
  chunk_size = min(config.chunk_size, length)
  config = dataclasses.replace(config, chunk_size=chunk_size)
  if marks is None and length % chunk_size:
    marks = jnp.zeros((batch, length), jnp.int32)
  if initial_state is None:
    initial_state = jnp.zeros((batch, channels, size), jnp.float32)
  state = initial_state.reshape(batch, groups, -1, size).swapaxes(2, 3)
  y, state = _scan(
    _Options(dt_softplus, config),
    (
      A.reshape(groups, -1, size).swapaxes(1, 2),
      optional(split, D),
      optional(split, dt_bias),
    ),
    state,
    (split(x), split(dt), B, C, optional(split, z)),
    marks,
  )
  state = state.swapaxes(2, 3).reshape(batch, channels, size)
  return y.reshape(x.shape), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, weights, state, tokens, marks):
  y, state, _ = _forward(options, weights, state, tokens, marks)
  return y, state


def _scan_forward(options, weights, state, tokens, marks):
  y, final, before = _forward(options, weights, state, tokens, marks)
  # Of the initial state the backward pass needs the dtype alone.
  like = jnp.zeros((0,), state.dtype)
  return (y, final), (weights, tokens, marks, before, like)


def _forward(options, weights, state, tokens, marks):
  """Returns y, the final state and the states in front of all chunks."""
  weights, state = _float32((weights, state))

  def chunk(h, inputs):
    h_next, y = _chunk(options, weights, h, *inputs)
    return h_next, (y, h)

  chunk_size = options.config.chunk_size
  inputs = (
    _to_chunks(tokens, chunk_size),
    _to_chunks(marks, chunk_size, fill=PADDING),
  )
  final, (y, before) = lax.scan(chunk, state, inputs)
  return _from_chunks(y, tokens[0].shape[1]), final, before


def _float32(tree):
  return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def _cast_like(tree, like):
  return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def _to_chunks(tokens, chunk_size, fill=0):
  """(B, L, ...) to (chunks, tokens, B, ...), filled up at the end."""

  def one(a):
    padding = [(0, 0)] * a.ndim
    padding[1] = (0, -a.shape[1] % chunk_size)
    a = jnp.pad(a, padding, constant_values=fill)
    a = a.reshape(a.shape[0], -1, chunk_size, *a.shape[2:])
    return jnp.moveaxis(a, 0, 2)

  return jax.tree.map(one, tokens)


def _from_chunks(a, length):
  a = jnp.moveaxis(a, 2, 0)
  return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]


def _enter(options, marks, x, dt, dt_bias):
  """Returns dt x and dt, (Q, B, G, E)."""
  if dt_bias is not None:
    dt = dt + dt_bias[None, None]
  if options.dt_softplus:
    dt = jax.nn.softplus(dt)
  if marks is not None:
    dt = jnp.where((marks == PADDING)[..., None, None], 0.0, dt)
  return dt * x, dt


def _leave(y, x, D, z):
  if D is not None:
    y = y + D[None, None] * x
  return y if z is None else y * jax.nn.silu(z)


def _decay(marks, dt, A):
  """From dt (..., G, E) and A (1..., G, N, E), 0 where the state is reset."""
  decay = jnp.exp(dt[..., None, :] * A)
  if marks is None:
    return decay
  return jnp.where((marks == RESET)[..., None, None, None], 0.0, decay)


def _over_size(h, v):
  """Sums h (..., N, E) times v (..., N) over N."""
  return jnp.sum(h * v[..., None], axis=-2)


def _over_group(h, v):
  """Sums h (..., N, E) times v (..., E) over E."""
  # As a product: reductions over the innermost axis are slow on CPUs.
  return jnp.einsum("...ne,...e->...n", h, v, precision=lax.Precision.HIGHEST)


def _chunk(options, weights, h, tokens, marks):
  """Returns the state after a chunk and its outputs, (Q, B, G, E)."""
  A, D, dt_bias = weights
  x, dt, B, C, z = _float32(tokens)
  u, dt = _enter(options, marks, x, dt, dt_bias)
  if options.config.associative:
    drive = u[..., None, :] * B[..., None]
    states = _states(options.config, _decay(marks, dt, A[None, None]), drive, h)
    h, y = states[-1], _over_size(states, C)
  else:

    def step(h, token):
      u, dt, B, C, marks = token
      h = _decay(marks, dt, A[None]) * h + u[:, :, None] * B[..., None]
      return h, _over_size(h, C)

    unroll = min(options.config.unroll, options.config.chunk_size)
    h, y = lax.scan(step, h, (u, dt, B, C, marks), unroll=unroll)
  return h, _leave(y, x, D, z).astype(tokens[0].dtype)


def _states(config, decay, drive, h, reverse=False):
  """Returns all h_t = decay_t h_{t-1} + drive_t, (Q, B, G, N, E)."""
  if config.associative:
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    decays, states = lax.associative_scan(
      combine, (decay, drive), reverse=reverse
    )
    return decays * h[None] + states

  def step(h, token):
    h = token[0] * h + token[1]
    return h, h

  unroll = min(config.unroll, config.chunk_size)
  inputs = (decay, drive)
  return lax.scan(step, h, inputs, reverse=reverse, unroll=unroll)[1]


def _scan_backward(options, residuals, cotangents):
  weights, tokens, marks, before, like = residuals
  dy, dstate = cotangents
  wide = _float32(weights)

  def chunk(carry, inputs):
    adjoint, totals = carry
    adjoint, dweights, dtokens = _chunk_backward(
      options, wide, adjoint, *inputs
    )
    return (adjoint, jax.tree.map(jnp.add, totals, dweights)), dtokens

  chunk_size = options.config.chunk_size
  inputs = _to_chunks((tokens, dy), chunk_size)
  marks = _to_chunks(marks, chunk_size, fill=PADDING)
  (dstate, dweights), dtokens = lax.scan(
    chunk,
    (dstate, jax.tree.map(jnp.zeros_like, wide)),
    (before, *inputs, marks),
    reverse=True,
  )
  length = dy.shape[1]
  return (
    _cast_like(dweights, weights),
    _cast_like(dstate, like),
    jax.tree.map(lambda a: _from_chunks(a, length), dtokens),
    None,
  )


def _chunk_backward(options, weights, adjoint, h, tokens, dout, marks):
  """Returns the cotangents of a chunk's initial state, weights and tokens.

  With g_t the cotangent of h_t and p_t = decay_t h_{t-1}:

    g_t = C_t dy_t + decay_{t+1} g_{t+1}
    dC_t = sum_E h_t dy_t      dB_t = sum_E g_t (dt_t x_t)
    d(dt_t x_t) = sum_N g_t B_t    ddt_t = sum_N g_t p_t A    dA = g_t p_t dt_t
  """
  A, D, dt_bias = weights
  x, raw_dt, B, C, z = _float32(tokens)
  enter = functools.partial(_enter, options, marks)
  (u, dt), enter_vjp = jax.vjp(enter, x, raw_dt, dt_bias)
  decay = _decay(marks, dt, A[None, None])
  drive = u[..., None, :] * B[..., None]
  states = _states(options.config, decay, drive, h)

  _, leave_vjp = jax.vjp(_leave, _over_size(states, C), x, D, z)
  dy, dx_skip, dD, dz = leave_vjp(dout.astype(jnp.float32))

  following = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])
  drive = C[..., None] * dy[..., None, :]
  g = _states(options.config, following, drive, adjoint, reverse=True)

  previous = jnp.concatenate([h[None], states[:-1]])
  gp = g * decay * previous
  ddt = jnp.sum(gp * A[None, None], axis=-2)
  dA = jnp.sum(gp * dt[..., None, :], axis=(0, 1))
  dx, ddt, dbias = enter_vjp((_over_size(g, B), ddt))
  dB, dC = _over_group(g, u), _over_group(states, dy)
  dtokens = _cast_like((dx + dx_skip, ddt, dB, dC, dz), tokens)
  return decay[0] * g[0], (dA, dD, dbias), dtokens


_scan.defvjp(_scan_forward, _scan_backward)
