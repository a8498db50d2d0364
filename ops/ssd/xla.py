"""The portable `ssd`: batched matrix products over chunks, own gradient.

Letters: B batch, C chunks, Q tokens of a chunk (as I, J and K where a pair of
them meets), G groups, R heads of a group, P channels, N state size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ops import dispatch
from ops.ssd import tuning


def forward(
  x, log_decay, dt, B, C, initial_state, D, z, *, chunk_size=None
) -> tuple[jax.Array, jax.Array]:
  """Implements `ssd` on any device; arguments as in `ops.ssd.api.apply`."""
  b, length, h, p = x.shape
  g, n = B.shape[2:]
  size = min(
    length,
    chunk_size or tuning.xla_chunk_size(length, p, n, dispatch.platform()),
  )

  def chunked(v, *shape):
    padding = [(0, 0), (0, -length % size)] + [(0, 0)] * (v.ndim - 2)
    return jnp.pad(v, padding).reshape(b, -1, size, *shape)

  if initial_state is None:
    initial_state = jnp.zeros((b, h, p, n), jnp.float32)
  initial_state = initial_state.reshape(b, g, h // g, p, n)
  y, state = scan_chunks(
    chunked(x, g, h // g, p),
    chunked(log_decay, g, h // g),
    chunked(dt, g, h // g),
    chunked(B, g, n),
    chunked(C, g, n),
    jnp.moveaxis(initial_state, -1, 2),
  )
  y = y.reshape(b, -1, h, p)[:, :length]
  if D is not None:
    y = y + D[None, None] * x.astype(jnp.float32)
  y = y.astype(x.dtype)
  if z is not None:
    gated = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    y = gated.astype(x.dtype)
  return y, jnp.moveaxis(state, 2, -1).reshape(b, h, p, n)


@jax.custom_vjp
def scan_chunks(x, log_decay, dt, B, C, initial_state):
  """Returns y, (B, C, Q, G, R, P) float32, and the last state.

  States are (N, R, P) in here: products with them then read and write tokens
  in the order in which they lie in memory.

  Args:
    x: (B, C, Q, G, R, P).
    log_decay: (B, C, Q, G, R) float32, at most 0.
    dt: (B, C, Q, G, R) float32.
    B: (B, C, Q, G, N).
    C: (B, C, Q, G, N).
    initial_state: (B, G, N, R, P) float32.
  """
  return _forward(x, log_decay, dt, B, C, initial_state)[0]


def _forward(x, log_decay, dt, B, C, initial_state):
  pairs, from_start, to_end, whole = _decays(log_decay)
  weights = _scores(B, C) * pairs * _heads_first(dt)[..., None, :]
  y = _dot("bcgrij,bcjgrp->bcigrp", weights.astype(x.dtype), x)
  added = _dot("bcjgn,bcjgrp->bcgnrp", B, _scaled(x, to_end * dt))
  states, state = _pass_on(initial_state, whole, added, x.dtype)
  y += from_start[..., None] * _dot("bcign,bcgnrp->bcigrp", C, states)
  return (y, state), (x, log_decay, dt, B, C, states)


def _backward(residuals, cotangents):
  x, log_decay, dt, B, C, states = residuals
  dy, dstate = cotangents
  pairs, from_start, to_end, whole = _decays(log_decay)
  scores = _scores(B, C)
  dt_J = _heads_first(dt)[..., None, :]
  dy_cast = dy.astype(x.dtype)
  dy_scaled = _scaled(dy, from_start, x.dtype)
  x_scaled = _scaled(x, to_end * dt)

  added = _dot("bcign,bcigrp->bcgnrp", C, dy_scaled)
  dstates, dinitial = _pass_on(dstate, whole, added, x.dtype, True)

  dweights = _dot("bcigrp,bcjgrp->bcgrij", dy_cast, x)
  per_dt = dweights * scores * pairs
  dscores = jnp.sum(dweights * pairs * dt_J, axis=3).astype(x.dtype)
  weights = (scores * pairs * dt_J).astype(x.dtype)

  passed = _dot("bcjgn,bcgnrp->bcjgrp", B, dstates)
  dx = _dot("bcgrij,bcigrp->bcjgrp", weights, dy_cast)
  dx += passed * (to_end * dt)[..., None]
  dB = _dot("bcgij,bcign->bcjgn", dscores, C)
  dB += _dot("bcjgrp,bcgnrp->bcjgn", x_scaled, dstates)
  dC = _dot("bcgij,bcjgn->bcign", dscores, B)
  dC += _dot("bcigrp,bcgnrp->bcign", dy_scaled, states)

  # What leaves token j for the end of its chunk, and what reaches token i from
  # the start: log_decay at k scales all that crosses it.
  leaving = jnp.sum(passed * x.astype(jnp.float32), axis=-1) * to_end
  read = _dot("bcign,bcgnrp->bcigrp", C, states)
  reaching = jnp.sum(read * dy, axis=-1) * from_start
  products = states.astype(jnp.float32) * dstates.astype(jnp.float32)
  through = jnp.sum(products, axis=(3, 5)) * whole
  ddt = jnp.moveaxis(jnp.sum(per_dt, axis=-2), -1, 2) + leaving
  left = jnp.pad(leaving * dt, [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0)])
  dlog_decay = (
    jnp.moveaxis(_crossing((per_dt * dt_J).astype(x.dtype)), -1, 2)
    + lax.cumsum(reaching, axis=2, reverse=True)
    + lax.cumsum(left[:, :, :-1], axis=2)
    + through[:, :, None]
  )
  grads = dx.astype(x.dtype), dlog_decay, ddt
  return *grads, dB.astype(B.dtype), dC.astype(C.dtype), dinitial


scan_chunks.defvjp(_forward, _backward)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _heads_first(v):
  """Turns (B, C, Q, G, R) into (B, C, G, R, Q)."""
  return jnp.moveaxis(v, 2, -1)


def _scaled(v, scale, dtype=None):
  """Returns (B, C, Q, G, R, P) times float32 (B, C, Q, G, R), rounded once."""
  scaled = v.astype(jnp.float32) * scale[..., None]
  return scaled.astype(dtype or v.dtype)


def _scores(B, C):
  return _dot("bcign,bcjgn->bcgij", C, B)[:, :, :, None]


def _decays(log_decay):
  """Returns decays of all pairs (.., I, J), from start, to end, of the chunk.

  Sums within a chunk can reach 128 Q, where float32 is too coarse for their
  differences. So whole numbers, whose sums are exact, are summed apart from
  what is left of them, at most 1/2 a token.
  """
  coarse = lax.round(log_decay, lax.RoundingMethod.TO_NEAREST_EVEN)
  sums = [lax.cumsum(v, axis=2) for v in (coarse, log_decay - coarse)]

  def exponent(of):
    return of(sums[0]) + of(sums[1])

  def pair(v):
    v = _heads_first(v)
    return v[..., :, None] - v[..., None, :]

  size = log_decay.shape[2]
  causal = jnp.tril(jnp.ones((size, size), bool))
  # Ahead of the exponential, which else overflows above the diagonal.
  causal = jnp.expand_dims(causal, (0, 1, 2, 3))
  pairs = jnp.where(causal, exponent(pair), -jnp.inf)
  to_end = exponent(lambda v: v[:, :, -1:] - v)
  from_start = exponent(lambda v: v)
  whole = from_start[:, :, -1]
  return tuple(jnp.exp(v) for v in (pairs, from_start, to_end, whole))


def _pass_on(state, whole, added, dtype, reverse=False):
  """Returns the states that all chunks start from, and the last.

  Args:
    state: (B, G, N, R, P), what the first chunk starts from.
    whole: (B, C, G, R), decays of a chunk.
    added: (B, C, G, N, R, P), what a chunk adds.
    dtype: Of the states returned; the last stays float32.
    reverse: Whether the first chunk is the one that comes last in memory.
  """
  chunks = added.shape[1]

  def step(turn, carry):
    state, states = carry
    c = chunks - 1 - turn if reverse else turn
    decay = lax.dynamic_index_in_dim(whole, c, 1, keepdims=False)
    chunk = lax.dynamic_index_in_dim(added, c, 1, keepdims=False)
    cast = state.astype(states.dtype)
    states = lax.dynamic_update_index_in_dim(states, cast, c, 1)
    return decay[:, :, None, :, None] * state + chunk, states

  start = state, jnp.zeros(added.shape, dtype)
  state, states = lax.fori_loop(0, chunks, step, start)
  return states, state


def _crossing(terms):
  """Sums (..., I, J) over i >= k > j to (..., K).

  Adding up is all it does: where nothing crosses, the gradient is exactly 0.
  A running difference of row and column sums would leave rounding errors.
  """
  size = terms.shape[-1]
  before = jnp.triu(jnp.ones((size, size), terms.dtype), 1)
  prefix = _dot("bcgrij,jk->bcgrik", terms, before)
  after = jnp.tril(jnp.ones((size, size), bool))
  after = jnp.expand_dims(after, (0, 1, 2, 3))
  return jnp.sum(jnp.where(after, prefix, 0), axis=-2)
