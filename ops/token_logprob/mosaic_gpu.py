"""The Mosaic GPU `token_logprob` for Hopper: logits stay in registers.

Forward, one kernel multiplies and reduces, so of 4 T V bytes of logits none
goes to memory; the targets' own logits are a gather. Backward, a kernel
multiplies again and writes the gradients of a block of logits in bfloat16, of
which two plain products make those of hidden and weight.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ops import dispatch
from ops.hopper import PROCESSORS
from ops.token_logprob import mosaic_gpu_backward, mosaic_gpu_forward
from ops.token_logprob import mosaic_gpu_tiles as tiles
from ops.token_logprob.mosaic_gpu_tiles import COLUMNS, DEPTH, TOKENS, Walk

# Bytes of hidden states at work at a time that leave the L2 cache of an H100 or
# H200 to the weights.
_CACHED = 20 * 2**20
# Gradients of logits that are in memory at a time, in bfloat16.
_BLOCK_ELEMENTS = 2**29


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels are launched.

  Attributes:
    forward: How that of the normalizers goes over the logits.
    backward: How that of the gradients of a block of logits does.
    columns: Columns of such a block, a multiple of `tiles.COLUMNS`.
  """

  forward: Walk
  backward: Walk
  columns: int


def configure(
  tokens: int, width: int, vocab: int, block_size: int | None = None
) -> Config:
  """Returns the Config for shapes; pure."""
  limit = block_size or _BLOCK_ELEMENTS // tokens
  columns = max(limit // COLUMNS, 1) * COLUMNS
  # Blocks of one size, so that the last is not mostly padding.
  columns = pl.cdiv(pl.cdiv(vocab, pl.cdiv(vocab, columns)), COLUMNS) * COLUMNS
  return Config(
    forward=_walk(tokens, width, vocab, mosaic_gpu_forward.SCRATCH),
    backward=_walk(tokens, width, columns, mosaic_gpu_backward.SCRATCH),
    columns=columns,
  )


def _walk(tokens, width, columns, scratch) -> Walk:
  """Returns how to go: over hidden states that stay, where a ring fits too."""
  blocks, count = pl.cdiv(tokens, TOKENS), pl.cdiv(columns, COLUMNS)
  resident = tiles.stages(width, True, scratch) >= min(4, width // DEPTH)

  def fills(splits):
    return (splits - 1) * pl.cdiv(count, splits) < count

  def cost(splits):
    # Hidden states that do not stay in shared memory must stay in the cache.
    active = min(blocks, pl.cdiv(PROCESSORS, splits)) * TOKENS * width * 2
    # In tiles, one after the other; to start and to end costs about one more.
    waves = pl.cdiv(blocks * splits, PROCESSORS)
    steps = waves * (pl.cdiv(count, splits) + 1)
    return not resident and active > _CACHED, steps

  candidates = filter(fills, range(1, min(count, PROCESSORS) + 1))
  return Walk(
    splits=min(candidates, key=cost),
    stages=tiles.stages(width, resident, scratch),
    resident=resident,
  )


def supports(hidden=None, weight=None, *, logit_scale=None) -> str | None:
  """Returns None where `forward` runs on these arguments, else why not."""
  del weight
  reason = dispatch.needs_wgmma()
  if reason:
    return reason
  return None if hidden is None else unfit(hidden, logit_scale)


def unfit(hidden, logit_scale=None) -> str | None:
  """Returns None if the kernels take these arguments, else why not."""
  if hidden.dtype != jnp.bfloat16:
    return f"needs bfloat16, hidden is {hidden.dtype}"
  if not hidden.size or hidden.shape[-1] % DEPTH:
    return f"needs tokens of a multiple of {DEPTH}, hidden is {hidden.shape}"
  if logit_scale is not None and logit_scale <= 0:
    return f"needs a positive logit_scale, this is {logit_scale}"
  return None


def forward(
  hidden_TE: jax.Array,
  weight: jax.Array,
  targets: jax.Array,
  *,
  vocab: int,
  block_size: int | None = None,
  scale: float = 1.0,
  config: Config | None = None,
  interpret=False,
) -> tuple[jax.Array, jax.Array]:
  """Implements `token_logprob` on Hopper; see `ops.token_logprob.api.apply`.

  `block_size` is rounded to whole tiles. `config` is by default that of
  `configure`; `interpret` is False or `InterpretGPUParams`.
  """
  if reason := unfit(hidden_TE, scale):
    raise ValueError(f"token_logprob: the Mosaic GPU kernel {reason}")
  config = config or configure(*hidden_TE.shape, vocab, block_size)
  return _logprob(
    hidden_TE,
    weight,
    targets.astype(jnp.int32),
    vocab,
    scale,
    config,
    interpret,
  )


def _padded(array, rows: int):
  """The array with rows of zeros up to a multiple of `rows`."""
  missing = -array.shape[0] % rows
  return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _logprob(hidden_TE, weight, targets, vocab, scale, config, interpret):
  weight_VE = _padded(weight[:vocab].astype(hidden_TE.dtype), COLUMNS)
  parts = mosaic_gpu_forward.normalizers(
    _padded(hidden_TE, TOKENS),
    weight_VE,
    vocab=vocab,
    scale=scale,
    config=config.forward,
    interpret=interpret,
  )
  normalizer = jax.nn.logsumexp(parts[:, : targets.shape[0]], axis=0)
  own_TE = jnp.take(weight_VE, targets, axis=0, mode="clip")
  logit = scale * jnp.sum(
    hidden_TE.astype(jnp.float32) * own_TE.astype(jnp.float32), axis=1
  )
  logit = jnp.where(targets < vocab, logit, -jnp.inf)
  # Sums in another order could leave a probability above one.
  return jnp.minimum(logit - normalizer, 0.0), normalizer


def _forward(hidden_TE, weight, targets, vocab, scale, config, interpret):
  results = _logprob(
    hidden_TE, weight, targets, vocab, scale, config, interpret
  )
  return results, (hidden_TE, weight, targets, results[1])


def _backward(vocab, scale, config, interpret, residuals, cotangents):
  hidden_TE, weight, targets, normalizer = residuals
  dlogprob, dnormalizer = (scale * cotangent for cotangent in cotangents)
  vectors = jnp.stack([normalizer, dnormalizer - dlogprob, dlogprob])
  vectors = _padded(vectors.T, TOKENS).T
  targets = _padded(targets, TOKENS)
  rows_TE = _padded(hidden_TE, TOKENS)
  weight_VE = _padded(weight[:vocab].astype(hidden_TE.dtype), config.columns)

  def body(index, carry):
    dhidden_TE, dweight_VE = carry
    begin = index * config.columns
    weight_CE = lax.dynamic_slice_in_dim(weight_VE, begin, config.columns, 0)
    dlogits_TC = mosaic_gpu_backward.logit_gradients(
      rows_TE,
      weight_CE,
      vectors,
      targets - begin,
      scale=scale,
      config=config.backward,
      interpret=interpret,
    )
    dhidden_TE += jnp.einsum(
      "tc,ce->te", dlogits_TC, weight_CE, preferred_element_type=jnp.float32
    )
    dweight_CE = jnp.einsum(
      "tc,te->ce", dlogits_TC, rows_TE, preferred_element_type=jnp.float32
    )
    dweight_VE = lax.dynamic_update_slice_in_dim(
      dweight_VE, dweight_CE.astype(weight.dtype), begin, 0
    )
    return dhidden_TE, dweight_VE

  carry = (
    jnp.zeros(rows_TE.shape, jnp.float32),
    jnp.zeros(weight_VE.shape, weight.dtype),
  )
  blocks = weight_VE.shape[0] // config.columns
  dhidden_TE, dweight_VE = lax.fori_loop(0, blocks, body, carry)
  dhidden_TE = dhidden_TE[: hidden_TE.shape[0]].astype(hidden_TE.dtype)
  rest = weight.shape[0] - vocab
  return dhidden_TE, jnp.pad(dweight_VE[:vocab], [(0, rest), (0, 0)]), None


_logprob.defvjp(_forward, _backward)
