"""The Mosaic GPU `mamba2_step` for Hopper: three kernels a layer, bfloat16.

For a batch of one the time of a step is that of reading the weights, and for a
large one that of reading and writing the states. So the kernels read both where
they lie, by an index of the layer that lies in memory: the same three kernels,
compiled once, serve all layers, and nothing is copied.

- `mosaic_gpu_in`: in_proj, and the step of the convolution;
- `mosaic_gpu_state`: the step of the state, and the gate;
- `mosaic_gpu_out`: out_proj, onto the residual stream.

A norm is a factor a row, which commutes with the product behind it. So each
kernel gives the sum of the squares of what it wrote, in parts, and the next one
applies the factor to its result. Sums are float32; the operands of products,
which are normed only then, are rounded to bfloat16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch, hopper_tiles
from ops.hopper import PROCESSORS, SHARED_MEMORY
from ops.mamba2_step import (
  mosaic_gpu_in,
  mosaic_gpu_out,
  mosaic_gpu_product,
  mosaic_gpu_state,
)
from ops.quantized import QState, is_quantized

MAX_BATCH = 64
STATE_SIZES = (64, 128)
# Bytes that memory could give while one kernel ends and the next begins, and
# while that of the states, when these are few, stands between two others.
IN_PREFETCH = 6 * 2**20
OUT_PREFETCH = 16 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels are launched.

  Attributes:
    in_columns: Columns of `in_proj` of a thread block, 64 or 128.
    in_stages: Chunks of 64 rows of these in shared memory.
    in_prefetch: Rows of the next layer's `in_proj` that the last kernel of a
      layer brings to the L2 cache, a multiple of 64.
    out_columns: Columns of `out_proj` of a thread block, 64 or 128.
    out_stages: Chunks of 64 rows of these in shared memory.
    out_prefetch: Rows of `out_proj` that the first kernel of a layer brings to
      the L2 cache, a multiple of 64.
    out_splits: Thread blocks of a cluster that share the rows of `out_proj`: 1,
      or where there is but one group 2, 4 or 8.
    overlap: Whether a kernel fetches its first weights while the one in front
      of it still runs (programmatic dependent launch).
  """

  in_columns: int = 64
  in_stages: int = 8
  in_prefetch: int = 0
  out_columns: int = 64
  out_stages: int = 8
  out_prefetch: int = 0
  out_splits: int = 1
  overlap: bool = False


def configure(
  batch: int, width: int, features: int, inner: int, groups: int, state: int
) -> Config:
  """Returns the Config for B, D, F, E, G and N; pure.

  All blocks run at once, so that together they keep as much of the weights in
  flight as shared memory holds.
  """
  rows, chunk = padded(batch), mosaic_gpu_product.CHUNK
  splits, blocks = 1, width // 64
  # A second block a multiprocessor, where the sums of few rows leave room.
  most = 2 * PROCESSORS if rows == 8 else PROCESSORS
  while groups == 1 and splits < 8 and 2 * splits * blocks <= most:
    if inner % (2 * splits * chunk):
      break
    splits *= 2

  def stages(blocks, depth, beside):
    free = SHARED_MEMORY // -(-blocks // PROCESSORS) - 4096 - 64 * rows * beside
    return max(2, min(free // (2 * chunk * (64 + rows)), depth // chunk, 24))

  def rows_of(budget, depth, columns):
    return min(budget // (2 * columns), depth) // chunk * chunk

  # Where the states are small, memory rests while they are stepped.
  idle = max(0, OUT_PREFETCH - 8 * batch * inner * state)
  return Config(
    # Beside the chunks lie float32 sums, and three inputs of the convolution.
    in_stages=stages(-(-features // 64), width, 4 + 3 * 2),
    in_prefetch=rows_of(IN_PREFETCH, width, features),
    out_stages=stages(blocks * splits, inner // splits, 4 * splits),
    out_prefetch=rows_of(idle, inner, width),
    out_splits=splits,
  )


def padded(batch: int) -> int:
  """N, the rows that the matrix unit sees for a batch."""
  return -(-batch // 8) * 8


def num_groups(conv_state, ssm_state) -> int:
  """G, told by the channels of the convolution that are not x."""
  h, p, n = ssm_state.shape[2:]
  return (conv_state.shape[-1] - h * p) // (2 * n)


def supports(
  x=None, weights=None, conv_state=None, ssm_state=None
) -> str | None:
  """Returns None where `forward` runs on these arguments, else why not."""
  if reason := dispatch.needs_wgmma():
    return reason
  return None if x is None else unfit(x, weights, conv_state, ssm_state)


def unfit(x, weights, conv_state, ssm_state) -> str | None:
  """Returns None if the kernels take these shapes and dtypes, else why not."""
  h, p, n = ssm_state.shape[2:]
  for name in ("in_proj", "out_proj"):
    weight = getattr(weights, name)
    if is_quantized(weight):
      return f"needs bfloat16, {name} is quantized"
    if weight.dtype != jnp.bfloat16:
      return f"needs bfloat16, {name} is {weight.dtype}"
  if weights.taps or is_quantized(weights.conv_weight):
    return "needs activations and a convolution that are not quantized"
  for name, state in (("conv_state", conv_state), ("ssm_state", ssm_state)):
    if isinstance(state, QState):
      return f"needs states in floats, {name} is in {state.tensor.format}"
  if conv_state.dtype != jnp.bfloat16:
    return f"needs bfloat16, conv_state is {conv_state.dtype}"
  if ssm_state.dtype != jnp.float32:
    return f"needs a float32 state, ssm_state is {ssm_state.dtype}"
  if x.shape[0] > MAX_BATCH:
    return f"needs at most {MAX_BATCH} rows, x is {x.shape}"
  if x.shape[1] % hopper_tiles.TILE:
    return f"needs a width of a multiple of 64, x is {x.shape}"
  if p != mosaic_gpu_state.HEAD or n not in STATE_SIZES:
    return f"needs heads of 64 channels with 64 or 128 states, not {p} with {n}"
  if not conv_state.shape[2]:
    return "needs a convolution of at least two taps"
  if h % 8:
    # TMA wants rows of the weights that begin at multiples of 16 bytes.
    return f"needs heads of a multiple of 8, ssm_state is {ssm_state.shape}"
  return None


def forward(
  x, weights, conv_state, ssm_state, *, eps, interpret=False, config=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Implements `mamba2_step` on Hopper; arguments as there.

  `interpret` is False or `InterpretGPUParams`; `config` is by default that of
  `configure`.
  """
  if reason := unfit(x, weights, conv_state, ssm_state):
    raise ValueError(f"mamba2_step: the Mosaic GPU kernel {reason}")
  batch, width = x.shape
  features, inner = weights.in_proj.shape[-1], weights.gated_norm.shape[-1]
  groups, size = num_groups(conv_state, ssm_state), ssm_state.shape[-1]
  config = config or configure(batch, width, features, inner, groups, size)
  if interpret:
    # The interpreter knows no stores to the memory of another block.
    config = dataclasses.replace(config, out_splits=1)
  x = jnp.pad(x.astype(jnp.float32), ((0, padded(batch) - batch), (0, 0)))
  residual = Residual.of(x, weights.norm[0], config)
  # A thread reads the same tap of neighbouring channels.
  weights = dataclasses.replace(
    weights, conv_weight=jnp.swapaxes(weights.conv_weight, 1, 2)
  )
  for i in range(conv_state.shape[0]):
    # A constant: to fill an array would be one more kernel a layer.
    index = np.array([i], np.int32)
    residual, conv_state, ssm_state = layer(
      config, eps, interpret, index, residual, weights, conv_state, ssm_state
    )
  return residual.value[:batch], conv_state, ssm_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
  """The residual stream in front of a layer, of N rows.

  Attributes:
    value: (N, D) float32.
    scaled: `value` times the scale of the layer's norm, (N, D) bfloat16.
    squares: Parts of the sum of the squares of `value` in their first columns,
      one for each block of `mosaic_gpu_out`, (N, .) float32.
  """

  value: jax.Array
  scaled: jax.Array
  squares: jax.Array

  @classmethod
  def of(cls, value, norm, config):
    """That of the first layer."""
    rows, width = value.shape
    blocks = width // config.out_columns
    parts = mosaic_gpu_product.PARTIALS
    squares = jnp.square(value).reshape(rows, blocks, -1).sum(axis=2)
    scaled = value * norm.astype(jnp.float32)[None]
    return cls(
      value,
      scaled.astype(jnp.bfloat16),
      jnp.pad(squares, ((0, 0), (0, -blocks % parts))),
    )


# A function of its own, since it is lowered once for all layers.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def layer(
  config, eps, interpret, index, residual, weights, conv_state, ssm_state
) -> tuple[Residual, jax.Array, jax.Array]:
  """Takes the residual stream through a layer.

  Args:
    config: A Config.
    eps: Of both norms.
    interpret: False, or the parameters of the interpreter.
    index: Of the layer, (1,) int32.
    residual: In front of it.
    weights: `Mamba2Weights`, but for the taps, (L, K, C).
    conv_state: As in `mamba2_step`.
    ssm_state: As in `mamba2_step`.

  Returns:
    The residual stream in front of the next layer, and the states.
  """
  weights = dataclasses.replace(
    weights,
    in_proj=mosaic_gpu_product.by_eights(weights.in_proj),
    out_proj=mosaic_gpu_product.by_eights(weights.out_proj),
  )
  options = {"config": config, "interpret": interpret}
  states = jax.new_ref(conv_state), jax.new_ref(ssm_state)
  rows, groups = residual.value.shape[0], num_groups(conv_state, ssm_state)
  projected = mosaic_gpu_in.project(
    index, residual.scaled, residual.squares, weights, states[0],
    eps=eps, **options,
  )  # fmt: skip
  gated, squares = mosaic_gpu_state.advance(
    index, projected, weights, states[1], rows, **options
  )
  following = mosaic_gpu_out.project(
    index, gated, squares, weights, residual.value, groups, eps=eps, **options
  )
  return Residual(*following), *map(jax.freeze, states)
