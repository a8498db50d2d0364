"""From shapes to the chunk size of each implementation of `ssd`."""


def xla_chunk_size(
  length: int, head_dim: int, state_size: int, platform: str
) -> int:
  """Returns the chunk size of the XLA version, a power of two.

  A chunk of Q tokens moves Q * Q numbers a head for the decayed scores and
  P * N for the state: both are alike at Q = sqrt(P * N). A CPU, where products
  cost more than memory, takes the power of two below it, others that above.
  """
  size = 16
  enough = head_dim * state_size // (4 if platform == "cpu" else 1)
  while size < 128 and size * size < enough:
    size *= 2
  while size > 16 and size >= 2 * length:
    size //= 2
  return size


def tpu_heads(heads: int, groups: int, head_dim: int) -> int | None:
  """Returns how many heads a TPU block holds, or None where none fits.

  A block's channels lie side by side in whole vectors of 128, and all its heads
  read one group. About 512 channels keep the matrix unit busy while a chunk's
  values still fit in fast memory.
  """
  fitting = [
    count
    for count in range(1, heads // groups + 1)
    if not heads // groups % count
    and (count == heads or not count * head_dim % 128)
  ]
  small = [count for count in fitting if count * head_dim <= 512]
  return max(small) if small else min(fitting, default=None)
