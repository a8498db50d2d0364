"""`token_logprob`: checks and choice of the implementation."""

import functools
import importlib
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ops import dispatch, sharding

# The kernel that was measured to be faster (experiments/results) is in front.
IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.kernel(
      "ops.token_logprob.mosaic_gpu", dispatch.needs_hopper
    ),
    "xla": dispatch.always,
  }
)


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
    block_size: Rows of `weight` a block of logits, of which there is one in
      memory at a time. By default a block has 2^25 logits, but no less than 512
      columns; "mosaic_gpu" has none in the forward, and 2^29 in bfloat16 in the
      backward.
    implementation: `"xla"`, `"mosaic_gpu"` (Hopper, bfloat16), or None for the
      best that runs here.

  Returns:
    (...) in float32; with `return_log_normalizer` also logsumexp(l), (...) in
    float32. Gradients of hidden and weight, in their dtypes; each is summed in
    float32.

  Raises:
    ValueError: shapes, dtypes or sizes do not fit.
  """
  vocab = weight.shape[0] if valid_vocab is None else valid_vocab
  _check(hidden, weight, targets, vocab, block_size, logit_scale)
  if sharding.sizes() and hidden.ndim > 1:
    options = {
      "logit_scale": logit_scale,
      "return_log_normalizer": return_log_normalizer,
      "valid_vocab": vocab,
      "block_size": block_size,
      "implementation": implementation,
    }
    return _over_devices(options, hidden, weight, targets)
  name = dispatch.resolve(
    "token_logprob",
    IMPLEMENTATIONS,
    implementation,
    hidden,
    weight,
    logit_scale=logit_scale,
  )
  logprob, normalizer = apply(
    importlib.import_module(f"ops.token_logprob.{name}").forward,
    hidden,
    weight,
    targets,
    logit_scale=logit_scale,
    valid_vocab=vocab,
    block_size=block_size,
  )
  return (logprob, normalizer) if return_log_normalizer else logprob


def _over_devices(options, hidden, weight, targets):
  """Every device has its own tokens, and the whole vocabulary."""
  middle = ("tokens",) if hidden.ndim == 3 else (None,) * (hidden.ndim - 2)
  rows = ("batch", *middle)
  return sharding.over_devices(
    functools.partial(token_logprob, **options),
    {"hidden": hidden, "weight": weight, "targets": targets},
    {"hidden": (*rows, None), "weight": (None, None), "targets": rows},
    (rows, rows) if options["return_log_normalizer"] else rows,
  )


def apply(
  forward: Callable,
  hidden,
  weight,
  targets,
  *,
  logit_scale=None,
  valid_vocab=None,
  block_size=None,
) -> tuple[jax.Array, jax.Array]:
  """Prepares the arguments in plain JAX and calls an implementation.

  Every implementation has the signature `forward(hidden_TE, weight, targets, *,
  vocab, block_size, scale) -> (logprob, normalizer)`: hidden is zero at ignored
  targets, where results and their cotangents are replaced by zeros; of weight
  (V, E) the first `vocab` rows count; block_size is None or positive.
  """
  # Whatever stands at ignored targets must not reach the gradient of weight.
  counts = targets >= 0
  hidden = jnp.where(counts[..., None], hidden, jnp.zeros((), hidden.dtype))
  results = forward(
    hidden.reshape(-1, hidden.shape[-1]),
    weight,
    targets.reshape(-1),
    vocab=weight.shape[0] if valid_vocab is None else valid_vocab,
    block_size=block_size,
    scale=1.0 if logit_scale is None else float(logit_scale),
  )
  logprob, normalizer = (
    jnp.where(counts, values.reshape(targets.shape), 0.0) for values in results
  )
  return logprob, normalizer


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
