"""Multiplications and operations of FABNet and its peers, by their own parts.

Every matrix of a model says what it multiplies; embeddings, norms, activations
and biases are left out, as in the paper's counts. A butterfly counts stage by
stage whatever form computes it, and a transform as radix-2 does.
"""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from models import fabnet
from models.fabnet_config import FABNetConfig

# Operations for each real multiplication: a matrix adds what it multiplies, a
# butterfly two of its four products; a complex butterfly of a transform has
# four multiplications and six additions.
_MATRIX, _BUTTERFLY, _FFT = 2.0, 1.5, 2.5


@dataclasses.dataclass(frozen=True)
class Count:
  """Work on one sequence.

  Attributes:
    multiplications: of real numbers.
    operations: these and additions.
  """

  multiplications: float = 0.0
  operations: float = 0.0

  def __add__(self, other: "Count") -> "Count":
    """The sum of both."""
    return Count(
      self.multiplications + other.multiplications,
      self.operations + other.operations,
    )

  def times(self, factor: float) -> "Count":
    """So many times as much."""
    return Count(self.multiplications * factor, self.operations * factor)


def count(config: FABNetConfig, length: int) -> dict[str, Count]:
  """Work on one sequence of `length` tokens, or on a pair of them.

  Args:
    config: of the model.
    length: L, padding included.

  Returns:
    "mixers" and "ffns" of all blocks, "head", and "blocks", the sum of the
    first two.
  """
  model = nnx.eval_shape(
    lambda: fabnet.FABNet(config, rngs=nnx.Rngs(params=jax.random.key(0)))
  )
  rows = length * (2 if config.pairs else 1)
  mixers = ffns = Count()
  for kind, layers in config.runs:
    block = getattr(model, kind)
    mixers += _mixer(kind, block.mixer, config, length).times(layers * rows)
    both = _matrix(block.ffn.up) + _matrix(block.ffn.down)
    ffns += both.times(layers * rows)
  head = _matrix(model.head_in) + _matrix(model.head_out)
  return {
    "mixers": mixers,
    "ffns": ffns,
    "head": head,
    "blocks": mixers + ffns,
  }


def _matrix(matrix: Any) -> Count:
  """Of one row."""
  number = float(matrix.multiplications())
  butterfly = hasattr(matrix, "twiddle")
  return Count(number, number * (_BUTTERFLY if butterfly else _MATRIX))


def _mixer(kind: str, mixer: Any, config: FABNetConfig, length: int) -> Count:
  """Of one token among `length`."""
  width = config.d_model
  if kind == "fourier":
    bits = sum(math.ceil(math.log2(size)) for size in (width, length))
    number = 2.0 * width * bits
    return Count(number, number * _FFT)
  if kind == "attention":
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    projections = [_matrix(getattr(mixer, name)) for name in names]
    scores = 2.0 * length * width
    return sum(projections, Count(scores, scores * _MATRIX))
  own = config.mamba
  kernels = (mixer.forward_mixer.in_proj, mixer.forward_mixer.out_proj)
  number = sum(float(math.prod(k.kernel.shape[-2:])) for k in kernels)
  number += own.conv_channels * own.d_conv
  # A step decays the state, adds to it, and reads it.
  number += own.d_inner * (3 * own.d_state + 2)
  return Count(number, number * _MATRIX).times(2)
