"""`QWeight`: a weight that says how what it multiplies is rounded."""

import dataclasses
from typing import Any, Self

import jax

from ops.hadamard_transform import hadamard_transform
from ops.quantized.quantize import dequantize
from ops.quantized.quantizer import Quantizer
from ops.quantized.state import QState
from ops.quantized.tensor import QTensor, expand_index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QWeight:
  """A weight W (..., D, F), kept as H^T W where its input is rotated by H.

  `quantized_matmul(x, w)` rotates x by `hadamard_transform`, quantizes it by
  `input`, and multiplies it by `weight`. Axes in front of D are stacked layers,
  over which a scan goes, and `input` has them too.

  Attributes:
    weight: (..., D, F), a `QTensor` of axis -2 or an array, in the basis of the
      rotated input.
    input: Of the activations; its scales are (..., G). None leaves them floats.
    hadamard: Whether they are rotated.
  """

  weight: QTensor | jax.Array
  input: Quantizer | None
  hadamard: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """(..., D, F)."""
    return self.weight.shape

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return self.weight.ndim

  @property
  def size(self) -> int:
    """Number of values of the weight."""
    return self.weight.size

  @property
  def dtype(self) -> jax.typing.DTypeLike:
    """Of the array that the weight stands for."""
    return self.weight.dtype

  @property
  def T(self) -> Self:
    """The same with a weight (..., F, D), as files keep it; not to multiply."""
    w = self.weight
    flipped = w.T if isinstance(w, QTensor) else w.swapaxes(-1, -2)
    return dataclasses.replace(self, weight=flipped)

  def __getitem__(self, index: Any) -> Self:
    """Indexes stacked layers and columns, as `QTensor` does."""
    index = expand_index(index, self.ndim)
    layers = index[: self.ndim - 2]
    return dataclasses.replace(
      self,
      weight=self.weight[index],
      input=jax.tree.map(lambda scales: scales[layers], self.input),
    )


def is_quantized(leaf: Any) -> bool:
  """Whether a leaf, or a node of a tree, stands for an array in few bits."""
  return isinstance(leaf, QTensor | QWeight)


def as_array(
  x: jax.Array | QTensor | QWeight | QState | None,
) -> jax.Array | None:
  """Returns the array that x stands for; arrays and None as they are."""
  if isinstance(x, QTensor):
    return dequantize(x)
  if isinstance(x, QState):
    return x.read()
  if not isinstance(x, QWeight):
    return x
  weight = as_array(x.weight)
  if x.hadamard:
    weight = hadamard_transform(weight, axis=-2, inverse=True)
  return weight
