"""Codebooks of formats: quantiles of distributions, and small float types.

Each is ascending. Numbers are written out, because to compute quantiles needs a
package that takes long to import; a test computes them again.
"""

# Quantiles of the normal distribution (Dettmers et al. 2023, QLoRA) and of
# Student's t with 5 degrees of freedom (Dotzel et al. 2024,
# https://arxiv.org/abs/2405.03103): 2^(b-1) probabilities from
# (1/32 + 1/30) / 2 to 1/2 and as many more to its mirror image, so that zero is
# a level, divided by the largest.
NF4 = (
  -1.0, -0.6961928, -0.5250730, -0.3949174, -0.2844413, -0.1847734, -0.0910500,
  0.0, 0.0795803, 0.1609301, 0.2461123, 0.3379151, 0.4407097, 0.5626169,
  0.7229566, 1.0,
)  # fmt: skip
SF4 = (
  -1.0, -0.6277806, -0.4547360, -0.3343307, -0.2374344, -0.1528987, -0.0749825,
  0.0, 0.0655131, 0.1329647, 0.2046610, 0.2838347, 0.3758048, 0.4910756,
  0.6567811, 1.0,
)  # fmt: skip
NF3 = (-1.0, -0.4786291, -0.2171418, 0.0, 0.1609301, 0.3379151, 0.5626169, 1.0)
SF3 = (-1.0, -0.4108477, -0.1801188, 0.0, 0.1329647, 0.2838347, 0.4910756, 1.0)

# "Abnormal Float" (Yoshida 2023, https://arxiv.org/abs/2306.06965): 0, the
# ends, and levels of the least mean absolute error of normal numbers divided by
# the largest magnitude of their block of 64.
AF4 = (
  -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478,
  -0.04934812, 0.0, 0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882,
  0.55496234, 0.72424863, 1.0,
)  # fmt: skip


def _signed(*magnitudes: float, more: float | None = None) -> tuple[float, ...]:
  """Zero, magnitudes of both signs, and one level more."""
  found = {0.0, *magnitudes, *(-m for m in magnitudes)}
  return tuple(sorted(found | ({more} if more is not None else set())))


# A float type of b bits has two codes of zero. In "super-range" and
# "super-precision" the second one is a level more (Dotzel et al. 2024).
FP4 = _signed(0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_SUPER_RANGE = _signed(0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, more=8.0)
FP4_SUPER_PRECISION = _signed(0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, more=5.0)
FP3 = _signed(1.0, 2.0, 4.0)
E3M0 = _signed(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Sums of two powers of two (Li et al. 2020, https://arxiv.org/abs/1909.13144).
APOT4 = _signed(0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
APOT4_SUPER_PRECISION = _signed(0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, more=0.5)


def _unsigned_float(exponent: int, mantissa: int) -> tuple[float, ...]:
  """Levels of a float type without a sign, whose last code is no number."""
  steps, bias = 2**mantissa, 2 ** (exponent - 1) - 1
  codes = range(2 ** (exponent + mantissa) - 1)
  split = [(code // steps, code % steps) for code in codes]
  return tuple(
    (m / steps + (e > 0)) * 2.0 ** (max(e, 1) - bias) for e, m in split
  )


# Scales of blocks that leave bits of a byte to say which level a block has more
# (RaZeR, https://arxiv.org/abs/2501.04052).
E3M3 = _unsigned_float(3, 3)
E4M3 = _unsigned_float(4, 3)
