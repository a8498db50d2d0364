"""Linear layers by dense and by structured matrices.

Each maps (..., D) to (..., F) and has a bias. Matrices by name:

  dense           D F parameters
  butterfly       log2 n sparse factors for n, the power of two from D up:
                  2 n log2 n parameters for each n outputs, or 4 (n - 1) tied
  monarch         two block-diagonal factors with a permutation between them
  block_diagonal  one block-diagonal matrix
  low_rank        two thin matrices
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers
from ops.butterfly_matmul import butterfly_matmul, init_twiddle, twiddle_shape
from ops.monarch_matmul import init_monarch, monarch_matmul


class Dense(layers.Linear):
  """`layers.Linear` with a bias."""

  def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
    """Truncated-normal kernel of variance 1 / D."""
    super().__init__(in_features, out_features, use_bias=True, rngs=rngs)

  def multiplications(self) -> int:
    """Of one row."""
    return math.prod(self.kernel.shape[-2:])


class _Structured(nnx.Module):
  """What the structured layers share: sizes and a bias.

  Attributes:
    bias: (F,).
  """

  def __init__(self, in_features: int, out_features: int):
    self.in_features, self.out_features = in_features, out_features
    self.bias = nnx.Param(jnp.zeros((out_features,)))

  def _with_bias(self, y):
    return y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)


class Butterfly(_Structured):
  """A butterfly matrix (Dao et al. 2019) with its bias.

  Attributes:
    twiddle: (S, 1, log2 n, n/2, 2, 2); tied (S, n - 1, 2, 2), where the stage
      of stride s has s matrices, at s - 1 and behind, for all its groups.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    tied: bool = False,
  ):
    """Random twiddles of variance 1/2."""
    super().__init__(in_features, out_features)
    self.shape, self.tied = twiddle_shape(in_features, out_features), tied
    stacks, half = self.shape[0], self.shape[3]
    shape = (stacks, 2 * half - 1, 2, 2) if tied else self.shape
    self.twiddle = nnx.Param(init_twiddle(rngs.params(), shape))

  def __call__(
    self, x: jax.Array, *, implementation: str | None = None
  ) -> jax.Array:
    """Maps (..., D) to (..., F), in the dtype of `x`."""
    twiddle = self.twiddle[...]
    y = butterfly_matmul(
      x,
      self._untied(twiddle) if self.tied else twiddle,
      out_features=self.out_features,
      implementation=implementation,
    )
    return self._with_bias(y)

  def _untied(self, twiddle):
    stages, half = self.shape[2:4]
    found = []
    for stage in range(stages):
      stride = 2**stage
      own = twiddle[:, stride - 1 : 2 * stride - 1]
      found.append(jnp.tile(own, (1, half // stride, 1, 1)))
    return jnp.stack(found, axis=1)[:, None]

  def multiplications(self) -> int:
    """Of one row, stage by stage, in whatever form it is computed."""
    return math.prod(self.shape)


class Monarch(_Structured):
  """A Monarch matrix (Dao et al. 2022) with its bias.

  Attributes:
    first: (K, Q, P).
    second: (K, S, Q).
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    blocks: int | None = None,
  ):
    """Random factors in `blocks` blocks, by default some sqrt(D)."""
    super().__init__(in_features, out_features)
    first, second = init_monarch(
      rngs.params(), in_features, out_features, blocks=blocks
    )
    self.first, self.second = nnx.Param(first), nnx.Param(second)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., D) to (..., F), in the dtype of `x`."""
    first, second = self.first[...], self.second[...]
    y = monarch_matmul(x, first, second, out_features=self.out_features)
    return self._with_bias(y)

  def multiplications(self) -> int:
    """Of one row."""
    return math.prod(self.first.shape[-3:]) + math.prod(self.second.shape[-3:])


class BlockDiagonal(_Structured):
  """A matrix of K blocks on the diagonal, with its bias.

  Attributes:
    kernel: (K, D / K, F / K).
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    blocks: int | None = None,
  ):
    """Normal blocks of variance K / D; K divides D and F."""
    super().__init__(in_features, out_features)
    blocks = blocks or 1
    shape = (blocks, in_features // blocks, out_features // blocks)
    kernel = jax.random.normal(rngs.params(), shape) * shape[1] ** -0.5
    self.kernel = nnx.Param(kernel)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., D) to (..., F), in the dtype of `x`."""
    kernel = self.kernel[...].astype(x.dtype)
    blocks = x.reshape(*x.shape[:-1], *kernel.shape[:2])
    y = jnp.einsum("...kd,kdf->...kf", blocks, kernel)
    return self._with_bias(y.reshape(*x.shape[:-1], -1))

  def multiplications(self) -> int:
    """Of one row."""
    return math.prod(self.kernel.shape[-3:])


class LowRank(_Structured):
  """A product of two thin matrices, with its bias.

  Attributes:
    down: (D, R).
    up: (R, F).
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    rank: int | None = None,
  ):
    """Random factors that keep the variance of their input."""
    super().__init__(in_features, out_features)
    rank = rank or 1
    init = jax.nn.initializers.lecun_normal()
    self.down = nnx.Param(init(rngs.params(), (in_features, rank)))
    self.up = nnx.Param(init(rngs.params(), (rank, out_features)))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., D) to (..., F), in the dtype of `x`."""
    middle = x @ self.down[...].astype(x.dtype)
    return self._with_bias(middle @ self.up[...].astype(x.dtype))

  def multiplications(self) -> int:
    """Of one row."""
    return math.prod(self.down.shape[-2:]) + math.prod(self.up.shape[-2:])


# Each kind with the options that it takes.
KINDS = {
  "dense": (Dense, ()),
  "butterfly": (Butterfly, ("tied",)),
  "monarch": (Monarch, ("blocks",)),
  "block_diagonal": (BlockDiagonal, ("blocks",)),
  "low_rank": (LowRank, ("rank",)),
}


class LayerNorm(nnx.Module):
  """Norm over the last axis with scale and shift (Ba et al. 2016).

  Attributes:
    scale: (D,).
    bias: (D,).
  """

  def __init__(self, features: int, *, eps: float):
    """Unit scale and no shift."""
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((features,)))
    self.bias = nnx.Param(jnp.zeros((features,)))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises (..., D), in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centered = x - mean
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    y = centered * jax.lax.rsqrt(variance + self.eps)
    widen = lambda v: jnp.broadcast_to(v.astype(jnp.float32), y.shape)
    return y * widen(self.scale[...]) + widen(self.bias[...])
