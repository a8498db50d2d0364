"""Log probabilities of given tokens, without their logits in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import dispatch

IMPLEMENTATIONS = dispatch.XLA_ONLY

# Logits of a block; and the fewest columns that keep a matrix unit busy.
_BLOCK_ELEMENTS = 2**25
_FEWEST_COLUMNS = 512


def token_logprob(
  hidden: jax.Array,
  weight: jax.Array,
  targets: jax.Array,
  *,
  logit_scale: float | None = None,
  return_log_normalizer: bool = False,
  valid_vocab: int | None = None,
  block_size: int | None = None,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Log probability of each target under a softmax over the vocabulary.

    l = logit_scale * hidden @ weight^T
    log p = l[target] - logsumexp(l)

  The normalizer is summed online over blocks of the vocabulary (Milakov and
  Gimelshein, https://arxiv.org/abs/1805.02867), and the backward computes each
  block's logits again, as in Cut Your Losses
  (https://arxiv.org/abs/2411.09009): `block_size` logits a token are in memory,
  never the whole vocabulary's. It is

    jnp.take_along_axis(jax.nn.log_softmax(l), targets[..., None], -1)[..., 0]

  Args:
    hidden: (..., E), bfloat16 or float32; products are in its dtype, sums and
      logits in float32.
    weight: (V, E), a row a token of the vocabulary; read in hidden's dtype.
    targets: (...), integers below `valid_vocab`. A negative one is ignored: it
      gives 0 and has no gradient. A larger one has probability 0.
    logit_scale: Factor of the logits, 1 by default; a Python number.
    return_log_normalizer: Also return logsumexp(l), for a z-loss.
    valid_vocab: Rows of `weight` that are tokens; those after them only pad.
    block_size: Rows of `weight` a block. By default a block has 2^25 logits,
      but no less than 512 columns.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    (...) in float32; with `return_log_normalizer` also logsumexp(l), (...) in
    float32. Gradients of hidden and weight, in their dtypes; each is summed in
    float32.

  Raises:
    ValueError: shapes, dtypes or sizes do not fit.
  """
  vocab = weight.shape[0] if valid_vocab is None else valid_vocab
  _check(hidden, weight, targets, vocab, block_size, logit_scale)
  dispatch.resolve("token_logprob", IMPLEMENTATIONS, implementation)
  # Whatever stands at ignored targets must not reach the gradient of weight.
  counts = targets >= 0
  hidden = jnp.where(counts[..., None], hidden, jnp.zeros((), hidden.dtype))
  rows = hidden.reshape(-1, hidden.shape[-1])
  if block_size is None:
    columns = _BLOCK_ELEMENTS // max(rows.shape[0], 1) // 128 * 128
    block_size = max(columns, _FEWEST_COLUMNS)
  scale = 1.0 if logit_scale is None else float(logit_scale)
  logprob, normalizer = _blockwise(
    rows, weight, targets.reshape(-1), vocab, min(block_size, vocab), scale
  )
  logprob, normalizer = (
    jnp.where(counts, values.reshape(targets.shape), 0.0)
    for values in (logprob, normalizer)
  )
  return (logprob, normalizer) if return_log_normalizer else logprob


def _check(hidden, weight, targets, vocab, block_size, logit_scale):
  op = "token_logprob"
  if (
    weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1:] != weight.shape[1:]
  ):
    raise ValueError(
      f"{op}: hidden {hidden.shape} and weight {weight.shape} are not"
      " (..., E) and (V, E)"
    )
  if targets.shape != hidden.shape[:-1]:
    raise ValueError(
      f"{op}: targets are {targets.shape}, not {hidden.shape[:-1]}"
    )
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise ValueError(f"{op}: targets are {targets.dtype}, not integers")
  if not 1 <= vocab <= weight.shape[0]:
    raise ValueError(
      f"{op}: valid_vocab is {vocab}, not from 1 to {weight.shape[0]}"
    )
  if block_size is not None and block_size < 1:
    raise ValueError(f"{op}: block_size is {block_size}, not positive")
  if not isinstance(logit_scale, int | float | None):
    raise ValueError(f"{op}: logit_scale is an array, not a Python number")


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


def token_logprob_reference(
  hidden: np.ndarray,
  weight: np.ndarray,
  targets: np.ndarray,
  *,
  logit_scale: float = 1.0,
  valid_vocab: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The specification in float64, one token at a time; with normalizers."""
  hidden = np.asarray(hidden, np.float64)
  weight = np.asarray(weight, np.float64)[:valid_vocab]
  logprob, normalizer = np.zeros(targets.shape), np.zeros(targets.shape)
  for token in np.ndindex(*targets.shape):
    if targets[token] < 0:
      continue
    logits = logit_scale * (weight @ hidden[token])
    highest = logits.max()
    normalizer[token] = highest + np.log(np.sum(np.exp(logits - highest)))
    logprob[token] = logits[targets[token]] - normalizer[token]
  return logprob, normalizer
