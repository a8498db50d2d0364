"""What calibration learns of the activations of one place.

Shapes by axis letter: C channels, K bins.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

# Of `Taps`, those that calibration looks at.
PLACES = ("conv_x", "conv_BC", "x", "B", "C", "dt", "z")

# Bins of log2 |x|: a percentile is known to within 2^(1/32), that is 2%.
_BINS_AN_OCTAVE = 32
_LOWEST, _HIGHEST = -24, 24
_BINS = _BINS_AN_OCTAVE * (_HIGHEST - _LOWEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
  """What is noted besides the largest magnitudes.

  Attributes:
    gram: products of channels, of what kernels multiply.
    percentiles: of magnitudes.
  """

  gram: bool = False
  percentiles: bool = False


MAXIMA = Wanted()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
  """Sums and maxima over all tokens that were seen.

  Attributes:
    count: () float32, tokens.
    absmax: (C,) float32, the largest magnitude of each channel.
    histogram: (K,) float32, magnitudes by their logarithm; None where no
      percentiles were asked for.
    gram: (C, C) float32, sum of x x^T; None where it was not asked for.
  """

  count: jax.Array
  absmax: jax.Array
  histogram: jax.Array | None
  gram: jax.Array | None

  @classmethod
  def of(cls, x: jax.Array, wanted: Wanted, num_leading: int = 2) -> Self:
    """Of activations whose first `num_leading` axes are tokens."""
    rows = x.reshape(int(np.prod(x.shape[:num_leading])), -1)
    rows = rows.astype(jnp.float32)
    sizes, histogram, gram = jnp.abs(rows), None, None
    if wanted.percentiles:
      places = jnp.log2(jnp.maximum(sizes, 2.0**_LOWEST)) - _LOWEST
      places = jnp.clip((places * _BINS_AN_OCTAVE).astype(int), 0, _BINS - 1)
      histogram = jnp.zeros((_BINS,), jnp.float32)
      histogram = histogram.at[places.reshape(-1)].add(1.0)
    if wanted.gram:
      gram = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    return cls(
      count=jnp.float32(rows.shape[0]),
      absmax=jnp.max(sizes, axis=0),
      histogram=histogram,
      gram=gram,
    )

  def merge(self, other: "Statistics") -> "Statistics":
    """Of the tokens of both."""
    plus = lambda a, b: None if a is None else a + b
    return Statistics(
      count=self.count + other.count,
      absmax=jnp.maximum(self.absmax, other.absmax),
      histogram=plus(self.histogram, other.histogram),
      gram=plus(self.gram, other.gram),
    )

  def percentile(self, percent: float) -> jax.Array:
    """A percentile of all magnitudes, (), from above by at most 2%.

    100 gives the maximum itself, which needs no histogram.
    """
    top = jnp.max(self.absmax)
    if percent >= 100:
      return top
    share = jnp.cumsum(self.histogram) / jnp.sum(self.histogram)
    # Sums of float32 end a little below or above one.
    place = jnp.argmax(share >= min(percent / 100, 1 - 1e-6))
    edge = 2.0 ** ((place + 1) / _BINS_AN_OCTAVE + _LOWEST)
    return jnp.minimum(edge, top)


@jax.tree_util.register_static
class Observer:
  """Stands where a `Quantizer` does, and notes what it is given, unchanged.

  It lives inside of one trace, of which `notes` is an output.
  """

  def __init__(self, notes: dict[str, Statistics], name: str, wanted: Wanted):
    """Keeps a reference to `notes`.

    Args:
      notes: what it adds to.
      name: of the place.
      wanted: what of it.
    """
    self._notes, self._name, self._wanted = notes, name, wanted

  def __call__(self, x: jax.Array) -> jax.Array:
    """Notes (B, T, ...); returns it."""
    # A product by parts calls once a part, with the same input.
    if self._name not in self._notes:
      self._notes[self._name] = Statistics.of(x, self._wanted)
    return x
