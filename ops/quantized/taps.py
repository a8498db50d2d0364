"""`Taps`: what of a layer is quantized besides its products."""

import dataclasses
from typing import Any, Self

import jax

from ops.quantized.quantizer import Quantizer
from ops.quantized.tensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Taps:
  """Quantizers of the places of a layer that no product with a weight reads.

  What a product reads is rounded by its `QWeight`. The shapes below are those
  of one token of one row, and None leaves a place as it is: E channels, H heads
  of P, G groups, N states; of attention H key/value heads of P. The scales of
  stacked layers have one more axis in front, over which a scan goes.

  Attributes:
    conv_x: (E,), input of the convolution.
    conv_BC: (2 G N,), the same of B and C, which Mamba-1 does not convolve.
    x: (E,) of Mamba-1, (H, P) of Mamba-2, input of the scan.
    B: (G, N).
    C: (G, N).
    dt: (E,) or (H,), without bias and softplus.
    z: (E,), the gate.
    y: (E,), input of Mamba-2's gated norm.
    ssm_state: (E, N) or (H, P, N), the state of the scan; without scales each
      state has its own. It says how states are kept where a caller does not.
    conv_state: (C,), the channels of the convolution's state, alike.
    k: (H, P), keys of attention behind their rotation, which caches keep so.
    v: (H, P), values of attention, alike.
  """

  conv_x: Quantizer | None = None
  conv_BC: Quantizer | None = None
  x: Quantizer | None = None
  B: Quantizer | None = None
  C: Quantizer | None = None
  dt: Quantizer | None = None
  z: Quantizer | None = None
  y: Quantizer | None = None
  ssm_state: Quantizer | None = None
  conv_state: Quantizer | None = None
  k: Quantizer | None = None
  v: Quantizer | None = None

  def __getitem__(self, index: Any) -> Self:
    """Those of one layer, or of some, of stacked layers."""
    return jax.tree.map(lambda scales: scales[index], self)

  @property
  def of_activations(self) -> Self:
    """Without those of the states, which know themselves how they are kept."""
    return dataclasses.replace(self, ssm_state=None, conv_state=None)

  def __bool__(self) -> bool:
    """Whether anything is quantized."""
    values = (getattr(self, one.name) for one in dataclasses.fields(self))
    return any(value is not None for value in values)


def rounded(x: jax.Array, by: Quantizer | None) -> jax.Array | QTensor:
  """Returns x (..., S) quantized, or as it is where `by` is None."""
  return x if by is None else by(x)
