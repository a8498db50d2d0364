"""`Quantizer`: how the activations of one place become a `QTensor`."""

import dataclasses

import jax

from ops.quantized.formats import Format
from ops.quantized.quantize import quantize
from ops.quantized.tensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
  """A format for activations, with scales where calibration has fixed them.

  Attributes:
    scales: Positive, (..., G) float32, for G blocks along the last axis of what
      it is given, or 1 for all; axes in front of it are counted from the right
      and broadcast: (1,) for a scale a tensor, (G,) for one a group, (H, 1) for
      one a head of (..., H, P), (C,) with the format "int8:1" for one a
      channel. None is dynamic: each input's own, by its largest magnitudes.
    format: Symmetric where scales are given. Where they are not, "row" or a
      group keeps the rows of a batch apart, "tensor" does not.
  """

  scales: jax.Array | None
  format: Format = dataclasses.field(metadata={"static": True})

  def __call__(self, x: jax.Array) -> QTensor:
    """Quantizes (..., S) along its last axis.

    Raises:
      ValueError: The groups of the format do not divide S, or the scales fit
        neither them nor the axes in front.
    """
    scales = self.scales
    if scales is not None:
      if scales.ndim > x.ndim:
        raise ValueError(
          f"Quantizer: scales {scales.shape} have more axes than {x.shape}"
        )
      scales = scales.reshape((1,) * (x.ndim - scales.ndim) + scales.shape)
    return quantize(x, self.format, scales=scales)
