"""Products with Monarch matrices: two block-diagonal ones and a permutation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch

IMPLEMENTATIONS = dispatch.XLA_ONLY


def monarch_matmul(
  x: jax.Array,
  first: jax.Array,
  second: jax.Array,
  *,
  out_features: int | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies rows by a Monarch matrix.

    u_kq = sum_p first[k, q, p] x_kp            channels in K blocks of P
    y_sl = sum_r second[l, s, r] v_rl           v is u's K Q values as (R, L)

  the matrices of Dao et al. (https://arxiv.org/abs/2204.00595), rectangular
  ones too: block-diagonal, transposed, block-diagonal, transposed back.
  It has K Q P + L S R parameters, and as many multiplications a row; with all
  sizes sqrt(n) that is 2 n^(3/2). A butterfly of n = K P channels, strides
  increasing, is one with L = P = Q and R = K. The equivalent plain JAX is

    u = jnp.einsum("kqp,bkp->bkq", first, x.reshape(-1, K, P))
    y = jnp.einsum("lsr,brl->bsl", second, u.reshape(-1, R, L))

  Args:
    x: (..., C), bfloat16 or float32, or complex64; padded by zeros to K P.
    first: (K, Q, P), of any float or complex dtype; taken in x's dtype.
    second: (L, S, R), with L R = K Q.
    out_features: D, at most S L, of which the first are taken; by default all.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    (..., D) in x's dtype, in complex64 where any is complex. Sums are float32;
    u is rounded to that dtype. Gradients of all three, by JAX, for which x and
    u are kept.

  Raises:
    ValueError: shapes, dtypes or out_features do not fit.
  """
  out_features = _check(x, first, second, out_features)
  dispatch.resolve(
    "monarch_matmul", IMPLEMENTATIONS, implementation, x, first, second
  )
  dtype = jnp.result_type(x.dtype, first.dtype, second.dtype)
  if not jnp.issubdtype(dtype, jnp.complexfloating):
    dtype = x.dtype
  (blocks, _, inner), (width, outer, depth) = first.shape, second.shape
  lead, features = x.shape[:-1], x.shape[-1]
  rows = math.prod(lead)
  x = x.astype(dtype).reshape(rows, features)
  x = jnp.pad(x, ((0, 0), (0, blocks * inner - features)))
  x = x.reshape(rows, blocks, inner)
  u = _product("bkp,kqp->bkq", x, first).reshape(rows, depth, width)
  y = _product("brl,lsr->bsl", u, second).reshape(rows, outer * width)
  return y[:, :out_features].reshape(*lead, out_features)


def _product(spec, x, weight):
  # The result is asked for in x's dtype: of one in float32 the gradient would
  # be float32, and with it both products of the backward pass.
  return jnp.einsum(
    spec,
    x,
    weight.astype(x.dtype),
    precision="highest",
    preferred_element_type=x.dtype,
  )


def init_monarch(
  key: jax.Array,
  in_features: int,
  out_features: int,
  *,
  blocks: int | None = None,
  dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  """Draws both factors, so that a product keeps the variance of its input.

  Args:
    key: Of the draw.
    in_features: C, padded to `blocks` times P.
    out_features: D, padded to `blocks` times S.
    blocks: K = L; by default the power of two next to the square root of C.
    dtype: float32, complex64, or another float or complex dtype.

  Returns:
    first (K, Q, P) of variance 1 / P, and second (K, S, Q) of variance 1 / Q,
    with Q the smaller of P and S; so the rank is at most K Q, that of the
    smaller side but for padding.

  Raises:
    ValueError: a number is below 1.
  """
  if min(in_features, out_features, 1 if blocks is None else blocks) < 1:
    raise ValueError(
      f"init_monarch: {in_features} to {out_features} channels by {blocks}"
      " blocks: all must be at least 1"
    )
  if blocks is None:
    blocks = 1 << round(math.log2(in_features) / 2)
  inner, outer = -(-in_features // blocks), -(-out_features // blocks)
  middle = min(inner, outer)
  first_key, second_key = jax.random.split(key)
  scale = lambda size: jnp.asarray(size**-0.5, dtype)
  first = jax.random.normal(first_key, (blocks, middle, inner), dtype)
  second = jax.random.normal(second_key, (blocks, outer, middle), dtype)
  return first * scale(inner), second * scale(middle)


def _check(x, first, second, out_features) -> int:
  op = "monarch_matmul"
  for name, array in (("x", x), ("first", first), ("second", second)):
    if not jnp.issubdtype(array.dtype, jnp.inexact):
      raise ValueError(f"{op}: {name} is {array.dtype}, not of a float dtype")
  for name, array, axes in (
    ("first", first, "(K, Q, P)"),
    ("second", second, "(L, S, R)"),
  ):
    if array.ndim != 3 or not array.size:
      raise ValueError(f"{op}: {name} is {array.shape}, not {axes}")
  (blocks, middle, inner), (width, outer, depth) = first.shape, second.shape
  if width * depth != blocks * middle:
    raise ValueError(
      f"{op}: second {second.shape} takes {width} x {depth} values, of which"
      f" first {first.shape} gives {blocks} x {middle}"
    )
  if x.ndim < 1 or not 1 <= x.shape[-1] <= blocks * inner:
    raise ValueError(
      f"{op}: x is {x.shape}, not (..., C) with C of 1 to {blocks * inner}, as"
      f" first {first.shape} takes them"
    )
  most = outer * width
  out_features = most if out_features is None else out_features
  if not 1 <= out_features <= most:
    raise ValueError(
      f"{op}: out_features is {out_features}, not of 1 to {most}, as second"
      f" {second.shape} makes them"
    )
  return out_features


def monarch_matmul_reference(
  x: np.ndarray,
  first: np.ndarray,
  second: np.ndarray,
  *,
  out_features: int | None = None,
) -> np.ndarray:
  """The specification in float64 or complex128, a value at a time.

  Arguments as in `monarch_matmul`.
  """
  dtype = np.result_type(x, first, second, np.float64)
  blocks, middle, inner = first.shape
  width, outer, _ = second.shape
  padded = np.zeros((*x.shape[:-1], blocks * inner), dtype)
  padded[..., : x.shape[-1]] = x
  u = np.zeros((*x.shape[:-1], blocks * middle), dtype)
  for k, q, p in np.ndindex(first.shape):
    u[..., k * middle + q] += first[k, q, p] * padded[..., k * inner + p]
  y = np.zeros((*x.shape[:-1], outer * width), dtype)
  for l, s, r in np.ndindex(second.shape):
    y[..., s * width + l] += second[l, s, r] * u[..., r * width + l]
  return y[..., :out_features]
