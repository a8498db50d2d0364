"""Layers shared by the models: linear, token table, norm, MLP, rotation.

Shapes by axis letter: `...` any leading axes, D width, F output width,
V vocabulary, H heads, K head dimension. Parameters are kept in their own dtype
and cast to the dtype of the activations; normalisation and rotation run in
float32.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import placement
from models.transformer_config import RopeScaling
from ops.quantized import QTensor, QWeight, as_array
from ops.quantized_matmul import quantized_matmul
from ops.rms_norm import rms_norm

# A module is a plain pytree: all that `models` makes consists of these layers.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)


class Linear(nnx.Module):
  """`x @ kernel (+ bias)`, kernel (D, F) in its own dtype or format.

  Attributes:
    kernel: (D, F), an array, a `QTensor` of axis -2 or a `QWeight`.
    bias: (F,) or None.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = False,
    rngs: nnx.Rngs,
  ):
    """Truncated-normal kernel of variance 1/D, zero bias."""
    init = jax.nn.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features)))
    self.bias = nnx.Param(jnp.zeros((out_features,))) if use_bias else None

  def __call__(
    self, x: jax.Array, *, out_dtype: jnp.dtype | None = None
  ) -> jax.Array:
    """Maps (..., D) to (..., F), in `out_dtype` or the dtype of `x`."""
    y = quantized_matmul(x, self.kernel[...], dtype=out_dtype)
    return y if self.bias is None else _add(y, self.bias[...])

  def split(
    self,
    x: jax.Array,
    sizes: Sequence[int],
    dims: Sequence[str | None] | None = None,
  ) -> list[jax.Array]:
    """Maps (..., D) to arrays (..., size), by a product each.

    An op that takes one of the arrays would copy a slice of a wider one.

    Args:
      x: (..., D).
      sizes: that add up to F.
      dims: what each of them is, by the names of `ops.sharding.RULES`.
    """
    ends = list(itertools.accumulate(sizes))
    kernel = self.kernel[...]
    ys = [
      quantized_matmul(
        x, placement.part(kernel[:, end - size : end], dim, x.dtype)
      )
      for size, end, dim in zip(sizes, ends, dims or [None] * len(ends))
    ]
    if self.bias is None:
      return ys
    return [
      _add(*both) for both in zip(ys, jnp.split(self.bias[...], ends[:-1]))
    ]

  def dense(self) -> jax.Array:
    """The kernel as an array (D, F), for ops that take nothing else."""
    return as_array(self.kernel[...])

  def stored(self) -> jax.Array | QTensor | QWeight:
    """The kernel as it is kept, for ops that take it in any format."""
    return self.kernel[...]

  def rescale(self, factor: float) -> None:
    """Multiplies the kernel, where a layer starts smaller than others."""
    self.kernel[...] = self.kernel[...] * factor


def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
  return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


class Embedding(nnx.Module):
  """Token table (V, D).

  Attributes:
    table: (V, D), an array or a `QTensor` of axis -1.
    scale: what is looked up is multiplied by it, in the dtype of the table;
      None leaves it. The scores of the rows are those of the table itself.
  """

  def __init__(
    self,
    vocab_size: int,
    features: int,
    *,
    std: float = 0.02,
    scale: float | None = None,
    rngs: nnx.Rngs,
  ):
    """Normal table of standard deviation `std`."""
    init = jax.nn.initializers.normal(std)
    self.scale = scale
    self.table = nnx.Param(init(rngs.params(), (vocab_size, features)))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks up (...) int32 tokens: (..., D)."""
    table = placement.gathered({"embed": {"table": self.table[...]}}, None)
    x = placement.rows(as_array(table["embed"]["table"][tokens]))
    return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)

  def logits(
    self, hidden: jax.Array, implementation: str | None = None
  ) -> jax.Array:
    """Maps hidden states (..., D) to float32 scores (..., V) of the rows.

    Args:
      hidden: (..., D).
      implementation: of the product with a table in a number format.
    """
    table = self.table[...].T
    return quantized_matmul(
      hidden,
      table,
      dtype=jnp.float32,
      implementation=implementation if isinstance(table, QTensor) else None,
    )

  def dense(self) -> jax.Array:
    """The table as an array (V, D)."""
    return as_array(self.table[...])


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis (Zhang & Sennrich 2019, eq. 4).

  Attributes:
    scale: (D,).
  """

  def __init__(self, features: int, *, eps: float):
    """Unit scale."""
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((features,)))

  def __call__(self, x: jax.Array, **options) -> jax.Array:
    """Normalises (..., D) in float32, returns the dtype of `x`.

    Takes the options of `ops.rms_norm`.
    """
    return rms_norm(x, self.scale[...], eps=self.eps, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpHooks:
  """Functions applied inside the MLP of every layer; None leaves it as is.

  Attributes:
    on_input: maps the normed input (..., D).
    on_middle: maps the gated intermediate (..., F).
    on_output: maps the output (..., D) before it joins the residual.
  """

  on_input: Callable[[jax.Array], jax.Array] | None = None
  on_middle: Callable[[jax.Array], jax.Array] | None = None
  on_output: Callable[[jax.Array], jax.Array] | None = None


class GatedMlp(nnx.Module):
  """Gated linear units (Shazeer 2020): down(activation(gate(x)) * up(x)).

  Attributes:
    activation: "silu" (SwiGLU), or "gelu" by tanh (GeGLU).
  """

  def __init__(
    self,
    features: int,
    width: int,
    *,
    activation: str = "silu",
    rngs: nnx.Rngs,
  ):
    """Builds gate and up (D = features, F = width), and down."""
    linear = functools.partial(Linear, rngs=rngs)
    self.activation = activation
    self.gate_proj = linear(features, width)
    self.up_proj = linear(features, width)
    self.down_proj = linear(width, features)

  def __call__(self, x: jax.Array, hooks: MlpHooks | None = None) -> jax.Array:
    """Maps (..., D) to (..., D)."""
    hooks = hooks or MlpHooks()
    x = hooks.on_input(x) if hooks.on_input else x
    middle = _gate(
      self.activation,
      placement.widths(self.gate_proj(x)),
      placement.widths(self.up_proj(x)),
    )
    middle = hooks.on_middle(middle) if hooks.on_middle else middle
    y = placement.rows(self.down_proj(middle))
    return hooks.on_output(y) if hooks.on_output else y


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _gate(activation, gate, up):
  """activation(gate) * up, of which the backward pass keeps the two alone."""
  return getattr(jax.nn, activation)(gate) * up


def rope_frequencies(
  head_dim: int,
  theta: float,
  scaling: RopeScaling | None = None,
  factor: float = 1.0,
) -> np.ndarray:
  """Angular frequencies (head_dim / 2,) in radians per position, float32.

  Source: RoFormer (Su et al. 2021), eq. 15; Llama-3 scaling as in the
  Llama 3.1 release (smooth interpolation between kept and scaled bands).

  Args:
    head_dim: K.
    theta: base.
    scaling: of Llama 3.
    factor: positions are divided by it (Chen et al. 2023).
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  frequency = theta**-exponent
  if scaling is None:
    return frequency.astype(np.float32) / np.float32(factor)
  wavelength = 2 * math.pi / frequency
  low = scaling.original_max_position / scaling.low_freq_factor
  high = scaling.original_max_position / scaling.high_freq_factor
  smooth = (
    scaling.original_max_position / wavelength - scaling.low_freq_factor
  ) / (scaling.high_freq_factor - scaling.low_freq_factor)
  smooth = np.clip(smooth, 0.0, 1.0)
  smooth = np.where(wavelength > low, 0.0, smooth)
  smooth = np.where(wavelength < high, 1.0, smooth)
  scaled = (1 - smooth) * frequency / scaling.factor + smooth * frequency
  return scaled.astype(np.float32) / np.float32(factor)


def apply_rope(
  x: jax.Array, positions: jax.Array, frequencies: np.ndarray
) -> jax.Array:
  """Rotates (..., H, K) by `positions` (...), half-split convention.

  The first half of K pairs with the second half (Hugging Face layout), not
  even with odd lanes.
  """
  angles = positions[..., None, None].astype(jnp.float32) * frequencies.reshape(
    (1,) * (positions.ndim + 1) + (-1,)
  )
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)
