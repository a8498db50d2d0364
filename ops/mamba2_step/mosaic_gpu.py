"""The Mosaic GPU `mamba2_step` for Hopper: three kernels a layer, or one.

For a batch of one the time of a step is that of reading the weights, and for a
large one that of reading and writing the states. So the kernels read both where
they lie, by an index of the layer that lies in memory: the same three kernels,
compiled once, serve all layers, and nothing is copied.

- `mosaic_gpu_in`: in_proj, and the step of the convolution;
- `mosaic_gpu_state`: the step of the state, and the gate;
- `mosaic_gpu_out`: out_proj, onto the residual stream.

Weights may be in few bits, and are read so: one row is then taken through all
layers by the one kernel of `mosaic_gpu_whole`. So may states be, as int8 with a
scale a (head, channel), which is found anew by every step.

A norm is a factor a row, which commutes with the product behind it. So each
kernel gives the sum of the squares of what it wrote, in parts, and the next one
applies the factor to its result. Sums are float32; the operands of products,
which are normed only then, are rounded to bfloat16.
"""

import dataclasses
import functools
from typing import Any

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
  mosaic_gpu_state_few_bits,
  mosaic_gpu_state_levels,
  mosaic_gpu_tiles,
  mosaic_gpu_whole,
)
from ops.quantized import QState, QTensor, QWeight, is_quantized
from ops.quantized_matmul import mosaic_gpu as few_rows
from ops.quantized_matmul import mosaic_gpu_product as few_bits

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
    in_stages: Chunks of 64 rows of these in shared memory; of weights of few
      bits, chunks of each warpgroup.
    in_warpgroups: That share these; 1 but for weights of few bits.
    in_splits: As out_splits, for `in_proj` where own_tiles is set.
    in_prefetch: Rows of the next layer's `in_proj` that the last kernel of a
      layer brings to the L2 cache, a multiple of 64.
    out_columns: Columns of `out_proj` of a thread block, 64 or 128.
    out_stages: As in_stages.
    out_warpgroups: As in_warpgroups.
    out_prefetch: Rows of `out_proj` that the first kernel of a layer brings to
      the L2 cache, a multiple of 64.
    out_splits: Thread blocks of a cluster that share the rows of `out_proj`: 1,
      or where there is but one group 2, 4 or 8.
    own_tiles: Whether each warpgroup of a block has columns of its own, 64, by
      `mosaic_gpu_tiles`: for weights of few bits. The chunks of a block are
      then those of all its warpgroups.
    state_blocks: Thread blocks that share rows and heads of states in few bits.
    state_warpgroups: Of such a block. Four are compiled to few registers.
    state_stages: States of a row and head in shared memory, of each.
    state_levels: Whether states in int8 are stepped in their levels, by
      `mosaic_gpu_state_levels`.
    overlap: Whether a kernel fetches its first weights while the one in front
      of it still runs (programmatic dependent launch).
  """

  in_columns: int = 64
  in_stages: int = 8
  in_warpgroups: int = 1
  in_splits: int = 1
  in_prefetch: int = 0
  out_columns: int = 64
  out_stages: int = 8
  out_warpgroups: int = 1
  out_prefetch: int = 0
  out_splits: int = 1
  own_tiles: bool = False
  state_blocks: int = 2 * PROCESSORS
  state_warpgroups: int = 1
  state_stages: int = 3
  state_levels: bool = False
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


def configure_few_bits(
  config: Config,
  batch: int,
  groups: int,
  weights: Any,
  ssm_state: Any = None,
  *,
  own_tiles: bool = False,
) -> Config:
  """Returns the Config where weights and states may be in few bits.

  Args:
    config: Of `configure`.
    batch: B.
    groups: G.
    weights: `Mamba2Weights`, of which shapes and formats are read.
    ssm_state: As in `mamba2_step`, of which these are read too; None is like
      float32.
    own_tiles: Of the Config, where both products have weights of 4 bits, with
      which it was measured, and allow it.
  """
  if own_tiles and (changes := _own_tiles(batch, groups, weights)):
    config = dataclasses.replace(config, in_columns=64, out_columns=64)
    found = configure_few_bits(config, batch, groups, weights, ssm_state)
    return dataclasses.replace(found, own_tiles=True, **changes)
  rows, changes = padded(batch), {}
  if isinstance(ssm_state, QState):
    steps = batch * ssm_state.shape[2]
    changes |= mosaic_gpu_state_few_bits.configure(steps)
  for name, columns, splits, parts in (
    ("in", config.in_columns, 1, 1),
    ("out", config.out_columns, config.out_splits, groups),
  ):
    w = of_weight(getattr(weights, f"{name}_proj"))
    if not isinstance(w, QTensor):
      continue
    depth, width = w.shape[-2:]
    while w.num_blocks > 1 and w.num_blocks % splits:
      splits //= 2
    blocks = -(-width // columns) * splits
    free = SHARED_MEMORY // min(2, -(-blocks // PROCESSORS)) - 4096
    # Beside the rings lie scales, and inputs of the convolution.
    free -= 4 * columns * (w.num_blocks // splits + 4) + 6 * rows * columns
    warpgroups, stages = few_bits.rings(
      free, rows=rows, depth=depth, columns=columns, groups=w.num_blocks,
      bits=w.format.bits, splits=splits, parts=parts,
    )  # fmt: skip
    changes |= {
      f"{name}_warpgroups": warpgroups,
      f"{name}_stages": stages,
      # The boxes of a prefetch are those of bfloat16 weights.
      f"{name}_prefetch": 0,
    }
    if name == "out":
      changes["out_splits"] = splits
  return dataclasses.replace(config, **changes)


def _own_tiles(batch: int, groups: int, weights: Any) -> dict[str, int]:
  """Fields of the Config with `own_tiles`, none where it cannot be."""
  changes = {}
  # Beside the chunks of in_proj lie inputs of the convolution.
  inputs = 2 * (weights.conv_weight.shape[2] - 1)
  for name, beside in (("in", inputs), ("out", 0)):
    w = of_weight(getattr(weights, f"{name}_proj"))
    if not isinstance(w, QTensor) or not w.format.packed or groups > 1:
      return {}
    depth, width = w.shape[-2:]
    found = mosaic_gpu_tiles.configure(
      rows=padded(batch), depth=depth, width=width, groups=w.num_blocks,
      bits=w.format.bits, beside=beside,
    )  # fmt: skip
    if found is None:
      return {}
    names = "warpgroups", "splits", "stages"
    changes |= {f"{name}_{one}": n for one, n in zip(names, found)}
  return changes


def whole_is_faster(x, weights, ssm_state) -> bool:
  """Whether one kernel for all layers takes these arguments, and is faster.

  With more rows it is bound by what its thread blocks tell each other.
  """
  if x.shape[0] > 1 or mosaic_gpu_whole.unfit(x, weights, ssm_state):
    return False
  device = dispatch.device()
  # Its blocks wait for each other, so all of them have to run at once.
  cores = getattr(device, "core_count", getattr(device, "num_cores", None))
  return (cores or 0) >= PROCESSORS


def of_weight(w):
  """The weight of a QWeight that does nothing to its input."""
  plain = isinstance(w, QWeight) and w.input is None and not w.hadamard
  return w.weight if plain else w


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
  if x is None:
    return None
  return unfit(x, weights, conv_state, ssm_state)


def unfit(x, weights, conv_state, ssm_state) -> str | None:
  """Returns None if the kernels take these shapes and dtypes, else why not."""
  h, p, n = ssm_state.shape[2:]
  for name in ("in_proj", "out_proj"):
    weight = of_weight(getattr(weights, name))
    if isinstance(weight, QWeight):
      return f"needs activations that are not quantized, {name} does it"
    if isinstance(weight, QTensor):
      if reason := few_rows.unfit_weight(weight):
        return reason
      groups = num_groups(conv_state, ssm_state) if name == "out_proj" else 1
      chunk = few_bits.chunk_of(weight.shape[-2], weight.num_blocks)
      if weight.shape[-2] % (groups * chunk):
        return f"needs groups of a norm of a multiple of {chunk} channels"
    elif weight.dtype != jnp.bfloat16:
      return f"needs bfloat16, {name} is {weight.dtype}"
  if weights.taps or is_quantized(weights.conv_weight):
    return "needs activations and a convolution that are not quantized"
  if isinstance(conv_state, QState):
    return f"needs bfloat16, conv_state is in {conv_state.tensor.format}"
  if conv_state.dtype != jnp.bfloat16:
    return f"needs bfloat16, conv_state is {conv_state.dtype}"
  if isinstance(ssm_state, QState):
    if reason := mosaic_gpu_state_few_bits.unfit(ssm_state):
      return reason
  elif ssm_state.dtype != jnp.float32:
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
  if config is None and not interpret:
    plain = dataclasses.replace(
      weights,
      in_proj=of_weight(weights.in_proj),
      out_proj=of_weight(weights.out_proj),
    )
    if whole_is_faster(x, plain, ssm_state):
      return mosaic_gpu_whole.forward(x, plain, conv_state, ssm_state, eps=eps)
  batch, width = x.shape
  features, inner = weights.in_proj.shape[-1], weights.gated_norm.shape[-1]
  groups, size = num_groups(conv_state, ssm_state), ssm_state.shape[-1]
  if config is None:
    config = configure(batch, width, features, inner, groups, size)
    config = configure_few_bits(
      config, batch, groups, weights, ssm_state,
      own_tiles=padded(batch) == MAX_BATCH,
    )  # fmt: skip
  if interpret:
    # The interpreter knows no stores to the memory of another block.
    config = dataclasses.replace(config, in_splits=1, out_splits=1)
  x = jnp.pad(x.astype(jnp.float32), ((0, padded(batch) - batch), (0, 0)))
  residual = Residual.of(x, weights.norm[0], config)
  kernels, weights = prepare(config, weights, x.shape[0], groups, interpret)
  for i in range(conv_state.shape[0]):
    # A constant: to fill an array would be one more kernel a layer.
    index = np.array([i], np.int32)
    residual, conv_state, ssm_state = layer(
      config, eps, interpret, kernels,
      index, residual, weights, conv_state, ssm_state,
    )  # fmt: skip
  return residual.value[:batch], conv_state, ssm_state


def prepare(config, weights, rows, groups, interpret):
  """Returns the products of both kernels, and weights as `layer` takes them.

  Args:
    config: A Config.
    weights: `Mamba2Weights`.
    rows: N.
    groups: G.
    interpret: False, or the parameters of the interpreter.
  """

  def product(name, splits, parts):
    w = of_weight(getattr(weights, f"{name}_proj"))
    columns, stages, warpgroups = (
      getattr(config, f"{name}_{one}")
      for one in ("columns", "stages", "warpgroups")
    )
    depth, width = w.shape[-2:]
    options = {
      "rows": rows,
      "depth": depth,
      "stages": stages,
      "splits": splits,
      "parts": parts,
      "overlap": config.overlap,
      "interpret": bool(interpret),
    }
    if not isinstance(w, QTensor):
      found = mosaic_gpu_product.Product(columns=columns, **options)
      return found, found.operands(w)
    options |= {
      "groups": w.num_blocks,
      "packed": w.format.packed,
      "warpgroups": warpgroups,
    }
    if config.own_tiles and parts == 1:
      found = mosaic_gpu_tiles.Product(
        tiles=warpgroups,
        exchange=splits > 1,
        **options,
      )
    else:
      found = few_bits.Product(
        tiles=columns // hopper_tiles.TILE,
        **options,
      )
    scales = jnp.broadcast_to(w.scales, (*w.values.shape[:-1], w.num_blocks))
    whole = -(-width // found.columns) * found.columns
    return found, found.operands(w.values, scales, whole)

  kernels, operands = zip(
    product("in", config.in_splits, 1),
    product("out", config.out_splits, groups),
  )
  return kernels, dataclasses.replace(
    weights,
    in_proj=operands[0],
    out_proj=operands[1],
    # A thread reads the same tap of neighbouring channels.
    conv_weight=jnp.swapaxes(weights.conv_weight, 1, 2),
  )


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
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def layer(
  config, eps, interpret, kernels,
  index, residual, weights, conv_state, ssm_state,
) -> tuple[Residual, jax.Array, jax.Array | QState]:  # fmt: skip
  """Takes the residual stream through a layer.

  Args:
    config: A Config.
    eps: Of both norms.
    interpret: False, or the parameters of the interpreter.
    kernels: The products, of `prepare`, as weights.
    index: Of the layer, (1,) int32.
    residual: In front of it.
    weights: Of all layers.
    conv_state: As in `mamba2_step`.
    ssm_state: As in `mamba2_step`.

  Returns:
    The residual stream in front of the next layer, and the states.
  """
  options = {"config": config, "interpret": interpret}
  states = jax.tree.map(jax.new_ref, (conv_state, ssm_state))
  rows, groups = residual.value.shape[0], num_groups(conv_state, ssm_state)
  few_bits = isinstance(ssm_state, QState)
  projected = mosaic_gpu_in.project(
    kernels[0], index, residual.scaled, residual.squares, weights, states[0],
    eps=eps, **options,
  )  # fmt: skip
  state_kernel = mosaic_gpu_state_few_bits if few_bits else mosaic_gpu_state
  if few_bits and config.state_levels:
    state_kernel = mosaic_gpu_state_levels
  gated, squares = state_kernel.advance(
    index, projected, weights, states[1], rows, **options
  )
  following = mosaic_gpu_out.project(
    kernels[1], index, gated, squares, weights, residual.value, groups,
    eps=eps, **options,
  )  # fmt: skip
  return Residual(*following), *jax.tree.map(jax.freeze, states)
