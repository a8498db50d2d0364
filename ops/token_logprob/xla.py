"""`token_logprob` in plain JAX: blocks of logits, in any dtype, anywhere."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Logits of a block; and the fewest columns that keep a matrix unit busy.
_BLOCK_ELEMENTS = 2**25
_FEWEST_COLUMNS = 512


def forward(
  hidden_TE: jax.Array,
  weight: jax.Array,
  targets: jax.Array,
  *,
  vocab: int,
  block_size: int | None = None,
  scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Implements `token_logprob`; arguments as in `ops.token_logprob.api.apply`.

  Without `block_size` a block has 2^25 logits, but no less than 512 columns.
  """
  if block_size is None:
    columns = _BLOCK_ELEMENTS // max(targets.shape[0], 1) // 128 * 128
    block_size = max(columns, _FEWEST_COLUMNS)
  return _blockwise(
    hidden_TE, weight, targets, vocab, min(block_size, vocab), scale
  )


def _block(hidden_TE, weight, index, vocab, size, scale):
  """Weights, first row and scaled logits of a block.

  The last block begins early enough to be whole; the rows that it shares with
  the one before are left out by logits of minus infinity.
  """
  begin = jnp.minimum(index * size, vocab - size)
  weight_CE = lax.dynamic_slice_in_dim(weight, begin, size, 0)
  weight_CE = weight_CE.astype(hidden_TE.dtype)
  logits_TC = scale * jnp.einsum(
    "te,ce->tc", hidden_TE, weight_CE, preferred_element_type=jnp.float32
  )
  fresh = begin + jnp.arange(size) >= index * size
  logits_TC = jnp.where(fresh[None, :], logits_TC, -jnp.inf)
  return weight_CE, begin, logits_TC


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _blockwise(hidden_TE, weight, targets, vocab, size, scale):
  tokens = targets.shape[0]

  def body(index, carry):
    highest, total, found = carry
    _, begin, logits_TC = _block(hidden_TE, weight, index, vocab, size, scale)
    higher = jnp.maximum(highest, jnp.max(logits_TC, axis=1))
    exponents_TC = jnp.exp(logits_TC - higher[:, None])
    total = total * jnp.exp(highest - higher) + jnp.sum(exponents_TC, axis=1)
    inside, column = _column(targets, begin, size)
    picked = jnp.take_along_axis(logits_TC, column[:, None], 1, mode="clip")
    # In a row that two blocks share only one of them has a logit.
    found = jnp.where(inside, jnp.maximum(found, picked[:, 0]), found)
    return higher, total, found

  lowest = jnp.full(tokens, jnp.finfo(jnp.float32).min)
  none = jnp.full(tokens, -jnp.inf)
  carry = lowest, jnp.zeros(tokens), none
  carry = lax.fori_loop(0, -(-vocab // size), body, carry)
  highest, total, found = carry
  normalizer = highest + jnp.log(total)
  return found - normalizer, normalizer


def _column(targets, begin, size):
  """Whether a target is in the block, and its column there."""
  column = targets - begin
  return (column >= 0) & (column < size), jnp.clip(column, 0, size - 1)


def _forward(hidden_TE, weight, targets, vocab, size, scale):
  out = _blockwise(hidden_TE, weight, targets, vocab, size, scale)
  return out, (hidden_TE, weight, targets, out[1])


def _backward(vocab, size, scale, residuals, cotangents):
  hidden_TE, weight, targets, normalizer = residuals
  dlogprob, dnormalizer = (scale * cotangent for cotangent in cotangents)

  def body(index, carry):
    dhidden_TE, dweight = carry
    weight_CE, begin, logits_TC = _block(
      hidden_TE, weight, index, vocab, size, scale
    )
    share_TC = jnp.exp(logits_TC - normalizer[:, None])
    dlogits_TC = (dnormalizer - dlogprob)[:, None] * share_TC
    inside, column = _column(targets, begin, size)
    hit_TC = inside[:, None] & (column[:, None] == jnp.arange(size)[None, :])
    hit_TC &= logits_TC > -jnp.inf
    dlogits_TC += jnp.where(hit_TC, dlogprob[:, None], 0.0)
    dlogits_TC = dlogits_TC.astype(hidden_TE.dtype)
    dhidden_TE += jnp.einsum(
      "tc,ce->te", dlogits_TC, weight_CE, preferred_element_type=jnp.float32
    )
    dweight_CE = jnp.einsum(
      "tc,te->ce", dlogits_TC, hidden_TE, preferred_element_type=jnp.float32
    )
    # All tokens are in this sum, so its rounding is the only one; the rows
    # that an earlier block has written are zero here.
    dweight_CE = dweight_CE.astype(weight.dtype)
    dweight_CE += lax.dynamic_slice_in_dim(dweight, begin, size, 0)
    dweight = lax.dynamic_update_slice_in_dim(dweight, dweight_CE, begin, 0)
    return dhidden_TE, dweight

  carry = jnp.zeros(hidden_TE.shape, jnp.float32), jnp.zeros_like(weight)
  carry = lax.fori_loop(0, -(-vocab // size), body, carry)
  return carry[0].astype(hidden_TE.dtype), carry[1], None


_blockwise.defvjp(_forward, _backward)
