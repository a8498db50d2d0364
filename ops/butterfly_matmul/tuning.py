"""Which form of a butterfly's product is fast at a size: counts, no timings.

M rows of C channels, padded to n = 2^k, to D features by S stacks of K blocks:

  radix2  6 M S n k K operations on vectors, and 2 k K passes over float32
  merged  2 M S n K sum(R) operations on matrix units, for groups of R channels,
          and 4 passes a group: a batch of products reads and writes, and what
          lies between two batches is transposed; but first n S K sum(R)
          entries are made
  dense   2 M C D operations, K times where blocks are not merged, and one pass;
          but first n^2 S K entries are made

The time of a form is the larger of its operations and its bytes at a machine's
rates. Few rows are decided by what is made of the twiddle, many by the rows.

The kernels for Hopper move what they read and write once, at rates that were
measured (`KERNELS`).
"""

import dataclasses
import types
from collections.abc import Mapping

# Channels of the largest group are 2^6: on a GPU groups of up to some 200
# channels wait for memory, and entries made of a twiddle grow with the group.
WIDEST = 6
# Bytes that an entry made of the twiddle moves: matrices double in width stage
# by stage, twice the last one's size in all, are read and written in float32,
# and that one is then cast.
_MADE = 24


@dataclasses.dataclass(frozen=True)
class Rates:
  """Operations and bytes in a second, of data sheets.

  Attributes:
    products: of bfloat16 products, of float32 products.
    vectors: of float32 outside of matrix units.
    bandwidth: bytes of memory.
  """

  products: tuple[float, float]
  vectors: float
  bandwidth: float


def rates(platform: str) -> Rates:
  """Of an H200, a TPU v5e (float32 in six passes), or some CPU cores."""
  if platform == "tpu":
    return Rates((197e12, 33e12), 4e12, 0.8e12)
  if platform in ("gpu", "cuda", "rocm"):
    return Rates((989e12, 67e12), 67e12, 4.8e12)
  return Rates((50e9, 100e9), 20e9, 10e9)


# Bytes of rows in a second that the kernels for Hopper move on an H200, by n;
# at 2,048 and 4,096 channels of 32,768 rows in .296 and .383 ms. For n of 256
# and 512 it is that of 1,024.
KERNELS: Mapping[int, float] = types.MappingProxyType(
  {256: 2.8e12, 512: 2.8e12, 1024: 2.8e12, 2048: 0.9e12, 4096: 1.4e12}
)
# Seconds that they take longer than a product of XLA's for a few rows.
_STARTING = 8e-6


def spans(stages: int) -> tuple[tuple[int, int], ...]:
  """The bits (a, b) of as few groups as hold 64 channels each, alike in size.

  The wider ones have the smaller strides, whose products are contiguous.
  """
  groups = max(1, -(-stages // WIDEST))
  edges = [-(-stages * group // groups) for group in range(groups + 1)]
  return tuple(zip(edges, edges[1:]))


def choose(
  rows: int,
  in_features: int,
  out_features: int,
  blocks: int,
  itemsize: int,
  platform: str,
) -> str:
  """The name of the form that takes the least time by the counts above."""
  times = _times(rows, in_features, out_features, blocks, itemsize, platform)
  return min(times, key=times.get)


def kernels_pay(
  rows: int, in_features: int, out_features: int, blocks: int
) -> bool:
  """Whether the kernels for Hopper take less time than all forms, in bfloat16.

  They are compared with forms at the rates of data sheets, which dense products
  reach to seven tenths.
  """
  n = padded(in_features)
  if n not in KERNELS:
    return False
  moved = 2.0 * rows * blocks * (in_features + out_features)
  least = _times(rows, in_features, out_features, blocks, 2, "gpu")
  return _STARTING + moved / KERNELS[n] < min(least.values())


def padded(in_features: int) -> int:
  """n: the power of two of at least 2 that is not below the features."""
  return 1 << max(1, (in_features - 1).bit_length())


def _times(*sizes):
  *sizes, platform = sizes
  own, itemsize = rates(platform), sizes[-1]
  return {
    name: max(
      products / own.products[itemsize > 2] + vectors / own.vectors,
      moved / own.bandwidth,
    )
    for name, (products, vectors, moved) in counts(*sizes).items()
  }


def counts(
  rows: int, in_features: int, out_features: int, blocks: int, itemsize: int
) -> dict[str, tuple[float, float, float]]:
  """Of each form: operations of products, those of vectors, and bytes."""
  n = padded(in_features)
  stages = n.bit_length() - 1
  stacks = -(-out_features // n)
  width = stacks * n
  # Of complex numbers a multiplication and an addition are four of each.
  factor = 4 if itemsize == 8 else 1
  groups = [1 << (last - first) for first, last in spans(stages)]
  used = blocks if rows <= n else 1
  made = float(width * n * blocks)
  join = 0.0 if used > 1 else 2.0 * width * n * n * (blocks - 1)
  ends = in_features * out_features + (used - 1) * width * n
  few = float(width * sum(groups) * blocks)
  return {
    "dense": (
      factor * (2.0 * rows * ends + join),
      factor * 2 * made,
      itemsize * (rows * (in_features + used * out_features) + made)
      + _MADE * made,
    ),
    "merged": (
      factor * 2.0 * rows * few,
      factor * 2 * few,
      itemsize * (4.0 * rows * width * len(groups) * blocks + few)
      + _MADE * few,
    ),
    "radix2": (
      0.0,
      factor * 6.0 * rows * width * stages * blocks,
      max(4, itemsize) * 2.0 * rows * width * stages * blocks,
    ),
  }
