"""Scales moved between a norm and the kernels behind it, and outliers planted.

Both leave the function of the model as it is: x diag(1/s) diag(s) W = x W.
"""

import jax
import jax.numpy as jnp
import numpy as np

from models import language_model
from models.module import Params
from research.quantization import structure
from research.quantization.calibration import KEYS, Notes
from research.quantization.structure import at

# A place other than a norm whose scale can take up the factors, and the
# kernels that read it.
_GATED = (("mixer", "norm"), [("mixer", "out_proj")])


def smooth(
  config: language_model.Config,
  params: Params,
  notes: list[Notes],
  alpha: float,
  *,
  stream: bool = True,
) -> Params:
  """Takes outliers of activations into the weights.

    s_c = max|x_c|^alpha / max_f|W_cf|^(1 - alpha)

  SmoothQuant (arXiv:2211.10438, eq. 4), for kernels behind a norm: those that
  read the residual stream, and Mamba-2's output, whose gated norm is a norm.

  Args:
    config: of the model.
    params: of the model, kernels as arrays.
    notes: of each layer, from `calibrate`.
    alpha: 0 leaves activations as they are, 1 weights.
    stream: whether kernels that read the residual stream are among them.
  """

  def change(layer, own):
    for norm, kernels in _pairs(own, stream):
      absmax = notes[layer][".".join(kernels[0])].absmax
      largest = lambda path, own=own: jnp.max(
        jnp.abs(at(own, path)["kernel"]), axis=-1
      )
      weights = jnp.max(jnp.stack([largest(path) for path in kernels]), axis=0)
      scales = jnp.maximum(absmax, 1e-5) ** alpha
      scales = scales / jnp.maximum(weights, 1e-5) ** (1 - alpha)
      own = _move(own, norm, kernels, jnp.maximum(scales, 1e-5))
    return own

  return structure.each_layer(config, params, change)


def smooth_keys(
  config: language_model.Config, params: Params, notes: list[Notes]
) -> Params:
  """Makes channels of keys alike large; queries take the factors.

  P3-LLM (https://arxiv.org/abs/2511.06838) divides each channel of a key by the
  largest magnitude that it had in the prompt, and multiplies the query by it.
  Here the magnitudes are those of calibration, and the two channels that a
  rotation of positions mixes share the larger one: so the factors pass through
  the rotation, and go into the weights. Factors of a head have a geometric mean
  of one.

  Args:
    config: of a model with keys and values of its own.
    params: of the model, kernels as arrays.
    notes: of each layer, from `calibrate`.
  """

  def change(layer, own):
    if KEYS not in notes[layer]:
      return own
    largest = notes[layer][KEYS].absmax.reshape(config.cached_heads, 2, -1)
    if structure.has(own, ("attn", "k_norm")):
      largest = jnp.max(largest, axis=0, keepdims=True)
    pairs = jnp.maximum(jnp.max(largest, axis=1, keepdims=True), 1e-5)
    pairs = pairs / jnp.exp(jnp.mean(jnp.log(pairs), axis=-1, keepdims=True))
    factors = jnp.broadcast_to(pairs, largest.shape)
    factors = factors.reshape(factors.shape[0], -1)
    if structure.has(own, ("attn", "k_norm")):
      own = _times(own, ("attn", "k_norm", "scale"), 1 / factors[0])
      return _times(own, ("attn", "q_norm", "scale"), factors[0])
    queries = at(own, ("attn", "q_proj", "kernel")).shape[-1]
    repeats = queries // factors.size
    wide = jnp.repeat(factors, repeats, axis=0).reshape(-1)
    for name, by in (("k_proj", 1 / factors.reshape(-1)), ("q_proj", wide)):
      for part in ("kernel", "bias"):
        if structure.has(own, ("attn", name, part)):
          own = _times(own, ("attn", name, part), by)
    return own

  return structure.each_layer(config, params, change)


def _times(own, path, factors):
  """A layer with the last axis of an array multiplied."""
  wide = lambda a: factors.reshape((1,) * (a.ndim - 1) + (-1,))
  return structure.update(own, path, lambda a: (a * wide(a)).astype(a.dtype))


def plant_outliers(
  config: language_model.Config,
  params: Params,
  *,
  factor: float,
  count: int,
  seed: int = 0,
) -> Params:
  """Makes a few channels behind every norm large; the function stays.

  So a small model gets the outliers that large ones have (arXiv:2208.07339,
  section 4), which are what quantizing activations fails by.

  Args:
    config: of the model.
    params: of the model, kernels as arrays.
    factor: of the channels.
    count: of channels of each norm.
    seed: of their choice.
  """
  generator = np.random.default_rng(seed)

  def change(_, own):
    for norm, kernels in _pairs(own, True):
      size = at(own, norm)["scale"].shape[-1]
      scales = np.ones(size, np.float32)
      scales[generator.choice(size, count, replace=False)] = 1 / factor
      own = _move(own, norm, kernels, jnp.asarray(scales))
    return own

  return structure.each_layer(config, params, change)


def _pairs(layer, stream: bool):
  """Norms, each with the kernels behind it."""
  found = structure.readers(layer) if stream else []
  return [*found, _GATED] if structure.has(layer, _GATED[0]) else found


def _move(own, norm, kernels, scales: jax.Array):
  """Divides what a norm gives by scales (D,), and multiplies its kernels."""
  own = structure.update(
    own, (*norm, "scale"), lambda g: (g / scales).astype(g.dtype)
  )
  for path in kernels:
    own = structure.update(
      own,
      (*path, "kernel"),
      lambda w: (w * scales[:, None]).astype(w.dtype),
    )
  return own
