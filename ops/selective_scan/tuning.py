"""From platform and shapes to the configs of the selective scan."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class XlaConfig:
  """How the XLA version walks through a sequence.

  Attributes:
    chunk_size: Tokens between two saved states. The backward pass holds all
      states of one chunk, and the saved states of all chunks.
    associative: Scan a chunk in parallel over its tokens, by doubling, instead
      of token by token.
    unroll: Tokens an iteration of the scan token by token.
  """

  chunk_size: int
  associative: bool = False
  unroll: int = 1


def xla_config(platform: str) -> XlaConfig:
  """Returns the config of the XLA version on "cpu", "gpu" or "tpu"."""
  if platform in ("gpu", "tpu"):
    # A step is too little work for one launch, so several are unrolled. Whole
    # chunks would take many times as long to compile: each output gets its own
    # copy of the steps in front of it, and gradients of 64 steps become 24,000
    # instructions. 16 were chosen on an H200: 64 take ten times as long to
    # compile, and 8 run slower.
    return XlaConfig(chunk_size=64, unroll=16)
  return XlaConfig(chunk_size=32)


def tpu_channels(channels: int, groups: int, size: int) -> int:
  """Returns the channels of a TPU block, in whole vectors of 128.

  A block reads one group. The wider it is, the less it costs to spread B and C
  over its channels; the states of a chunk of 128 tokens, which the backward
  kernel keeps, shall take 4 MiB at most, unless a single vector takes more.
  """
  vectors = -(-channels // groups // 128)
  most = max(1, min(4, 64 // size))
  return 128 * max(n for n in range(1, most + 1) if vectors % n == 0)
