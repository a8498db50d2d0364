"""The Mosaic GPU `transformer_step` for Hopper: five kernels a layer.

For few rows the time of a step is that of reading weights and caches. So the
kernels read both where they lie, by an index of the layer that lies in memory:
the same kernels, compiled once, serve all layers, and nothing is copied.

- `mosaic_gpu_qkv`: queries, keys and values, rotated; these go to the cache;
- `mosaic_gpu_attend`: attention to a part of a row's slots, merged in a cluster
  of blocks, or by XLA;
  with pages `mosaic_gpu_paged` in its place, attention to the best of them;
- `mosaic_gpu_out`: o_proj, onto the residual stream;
- `mosaic_gpu_gate_up`: both products in front of the gate, and the gate;
- `mosaic_gpu_out`: down_proj, onto the residual stream.

A norm is a factor a row, which commutes with the product behind it. So the
kernels that write the stream give the sum of its squares, in parts, and the
next one applies the factor to its result. The stream is float32 here, be x in
bfloat16; the operands of products are bfloat16, and their sums float32. Weights
of few bits become bfloat16 where they are multiplied.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch
from ops.hopper import PROCESSORS, SHARED_MEMORY
from ops.hopper_attention import OF_TILE, QUERIES
from ops.hopper_tiles import TILE
from ops.mamba2_step.mosaic_gpu_product import CHUNK, PARTIALS, Product
from ops.paged_sparse_attention import PageSummary
from ops.quantized import QTensor, is_quantized
from ops.transformer_step import (
  mosaic_gpu_attend,
  mosaic_gpu_few_bits,
  mosaic_gpu_gate_up,
  mosaic_gpu_out,
  mosaic_gpu_paged,
  mosaic_gpu_qkv,
  xla,
)

MAX_BATCH = 64
HEAD_SIZES = (64, 128)
# Blocks of a cluster, at most.
CLUSTER = 8
# Bytes that memory could give while one kernel ends and the next begins.
AHEAD = 6 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels are launched.

  Attributes:
    qkv_stages: Chunks of 64 rows of a block's weights in shared memory.
    qkv_splits: Thread blocks of a cluster that share the rows of the weights.
    o_stages: As of qkv, as the next five.
    o_splits:
    gate_up_stages:
    gate_up_splits:
    down_stages:
    down_splits:
    attend_splits: Thread blocks that share the slots of a row's head.
    attend_cluster: Whether these are a cluster.
    attend_stages: Tiles of 64 keys or values in shared memory.
    qkv_warpgroups: Of a block, which share its chunks: 1 but for weights of few
      bits, as of the next three.
    o_warpgroups:
    gate_up_warpgroups:
    down_warpgroups:
    ahead: Bytes of weights that a kernel brings to the L2 cache for a later
      one, see `mosaic_gpu_ahead`.
  """

  qkv_stages: int = 8
  qkv_splits: int = 1
  o_stages: int = 8
  o_splits: int = 1
  gate_up_stages: int = 8
  gate_up_splits: int = 1
  down_stages: int = 8
  down_splits: int = 1
  attend_splits: int = 1
  attend_cluster: bool = False
  attend_stages: int = 8
  qkv_warpgroups: int = 1
  o_warpgroups: int = 1
  gate_up_warpgroups: int = 1
  down_warpgroups: int = 1
  ahead: int = 0


def configure(
  batch: int, width: int, hidden: int, heads: int, kv_heads: int, size: int,
  slots: int,
) -> Config:  # fmt: skip
  """Returns the Config for B, D, F, H, N, K and S; pure.

  All blocks of a product run at once where they can, so that together they keep
  as much of the weights in flight as shared memory holds.
  """
  found = {}
  for name, (depth, columns, blocks) in {
    "qkv": (width, size, heads + 2 * kv_heads),
    "o": (heads * size, TILE, width // TILE),
    "gate_up": (width, 2 * TILE, hidden // TILE),
    "down": (hidden, TILE, width // TILE),
  }.items():
    splits = _splits(blocks, depth)
    found[f"{name}_splits"] = splits
    found[f"{name}_stages"] = _stages(
      padded(batch), depth // splits, columns, splits, blocks
    )
  tiles = slots // TILE
  most = SHARED_MEMORY // 4 // OF_TILE
  pairs = batch * kv_heads
  # Blocks of a cluster merge what they found where slots are few: a tile more
  # costs such a block .7 us on an H200, and what XLA merges takes 3 us.
  cluster = tiles <= 2 * CLUSTER and 2 * pairs * CLUSTER <= 3 * PROCESSORS
  if cluster:
    splits = min(CLUSTER, tiles)
  else:
    # Two blocks a multiprocessor, and no more scores than a block has room for.
    wanted = max(1, 2 * PROCESSORS // pairs)
    splits = min(max(wanted, -(-tiles // most)), tiles)
  free = SHARED_MEMORY // (1 if pairs * splits <= PROCESSORS else 2)
  free -= 8192 + OF_TILE * -(-tiles // splits)
  if cluster:
    free -= 4 * QUERIES * ((splits - 1) * (size + 2 * TILE) + size)
  return Config(
    **found,
    ahead=AHEAD,
    attend_splits=splits,
    attend_cluster=cluster and splits > 1,
    attend_stages=max(2, min(free // (2 * TILE * size), 24)),
  )


def _splits(blocks: int, depth: int) -> int:
  """Blocks of a cluster that share K, so that most multiprocessors have one."""
  chunks = depth // CHUNK
  found = [n for n in range(1, CLUSTER + 1) if chunks % n == 0]
  enough = [n for n in found if 3 * n * blocks >= 2 * PROCESSORS]
  return enough[0] if enough else found[-1]


def _stages(
  rows: int, depth: int, columns: int, splits: int, blocks: int
) -> int:
  """Chunks of a block in shared memory."""
  # Clusters of more than two do not fill all multiprocessors: some have to have
  # room for two blocks, or the last cluster would begin when another one ends.
  alone = splits <= 2 and splits * blocks <= PROCESSORS
  free = SHARED_MEMORY if alone else SHARED_MEMORY // 2 - 1024
  free -= 4096 + 4 * rows * (columns + 4) * (splits + 1)
  chunk = 2 * CHUNK * (columns + rows)
  return max(2, min(free // chunk, depth // CHUNK))


def padded(batch: int) -> int:
  """Rows that the matrix unit sees for a batch."""
  return -(-batch // 8) * 8


def supports(
  x=None, weights=None, keys=None, values=None, lengths=None, frequencies=None,
  *, pages=None,
) -> str | None:  # fmt: skip
  """Returns None where `forward` runs on these arguments, else why not."""
  if reason := dispatch.needs_wgmma():
    return reason
  if x is None:
    return None
  reason = unfit(x, weights, keys, values)
  if reason is None and pages is not None:
    return mosaic_gpu_paged.unfit(keys, values, pages)
  return reason


def unfit(x, weights, keys, values) -> str | None:
  """Returns None if the kernels take these shapes and dtypes, else why not."""
  for name, value in vars(weights).items():
    if name.endswith("_bias") or name in ("q_norm", "k_norm"):
      if value is not None:
        return f"knows no {name}"
  if reason := mosaic_gpu_few_bits.unfit(weights):
    return reason
  if weights.taps:
    return "needs keys and values that are not quantized"
  for name, cache in (("keys", keys), ("values", values)):
    if is_quantized(cache) or cache.dtype != jnp.bfloat16:
      return f"needs bfloat16, {name} are {cache.dtype} or of few bits"
  slots, heads, size = keys.shape[2:]
  if x.shape[1] != 1 or x.shape[0] > MAX_BATCH:
    return f"needs one token of at most {MAX_BATCH} rows, x is {x.shape}"
  if size not in HEAD_SIZES:
    return f"needs heads of 64 or 128, keys are {keys.shape}"
  if weights.q_proj.shape[-1] > QUERIES * heads * size:
    return "needs at most eight queries to a key"
  if x.shape[2] % TILE or weights.gate_proj.shape[-1] % TILE or slots % TILE:
    return (
      f"needs widths and slots of multiples of 64, x is {x.shape}, gate_proj"
      f" {weights.gate_proj.shape} and keys {keys.shape}"
    )
  return None


def forward(
  x, weights, keys, values, lengths, frequencies, *, eps, pages=None,
  interpret=False, config=None,
) -> tuple:  # fmt: skip
  """Implements `transformer_step` on Hopper; arguments as there.

  The new token has to have a slot. `interpret` is False or
  `InterpretGPUParams`; `config` is by default that of `configure`.
  """
  if reason := unfit(x, weights, keys, values) or (
    pages is not None and mosaic_gpu_paged.unfit(keys, values, pages)
  ):
    raise ValueError(f"transformer_step: the Mosaic GPU kernel {reason}")
  batch, _, width = x.shape
  slots, kv_heads, size = keys.shape[2:]
  heads = weights.q_proj.shape[-1] // size
  if config is None:
    hidden = weights.gate_proj.shape[-1]
    config = configure(batch, width, hidden, heads, kv_heads, size, slots)
    config = mosaic_gpu_few_bits.configure(config, padded(batch), size, weights)
  if interpret:
    # The interpreter knows no stores to the memory of another block, so that a
    # product is whole, and XLA merges.
    alone = dict.fromkeys(("qkv", "o", "gate_up", "down"), 1)
    alone = {f"{name}_splits": one for name, one in alone.items()}
    config = dataclasses.replace(config, **alone, attend_cluster=False, ahead=0)
  rows = padded(batch)
  stream = jnp.pad(x[:, 0].astype(jnp.float32), ((0, rows - batch), (0, 0)))
  angles = jnp.asarray(frequencies, jnp.float32)[None] * lengths[:, None]
  turns = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
  turns = jnp.pad(turns, ((0, 0), (0, rows - batch), (0, 0)))
  kernels, operands = prepare(config, weights, rows, size, interpret)
  residual = Residual.of(stream, weights.attn_norm[0])
  last = []
  for i in range(keys.shape[0]):
    # A constant: to fill an array would be one more kernel a layer.
    index = np.array([i], np.int32)
    residual, keys, values, *more = layer(
      config, eps, interpret, kernels, heads,
      index, residual, operands, keys, values, lengths, turns, pages,
    )  # fmt: skip
    last.append(more)
  found = residual.value[:batch, None].astype(x.dtype), keys, values
  if pages is None:
    return found
  last = PageSummary(*map(jnp.stack, zip(*last)), pages.summary.kind)
  return *found, xla.written(pages.summary, last, slots, lengths)


def prepare(config, weights, rows, size, interpret):
  """Returns the products of a layer by name, and weights as these take them."""
  kernels, operands = [], {}
  for name, columns in mosaic_gpu_few_bits.columns_of(size).items():
    parts = mosaic_gpu_few_bits.matrices(weights, name)
    if isinstance(parts[0], QTensor):
      product, found = mosaic_gpu_few_bits.product(
        config, name, rows, size, parts, interpret
      )
    else:
      product = Product(
        rows=rows,
        depth=parts[0].shape[-2],
        columns=columns,
        stages=getattr(config, f"{name}_stages"),
        splits=getattr(config, f"{name}_splits"),
        interpret=bool(interpret),
      )
      found = [product.operands(one) for one in parts]
    kernels.append(product)
    operands |= zip(mosaic_gpu_few_bits.MATRICES[name], found)
  return tuple(kernels), dataclasses.replace(weights, **operands)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
  """The residual stream, of N rows.

  Attributes:
    value: (N, D) float32.
    scaled: `value` times the scale of the next norm, (N, D) bfloat16.
    squares: Parts of the sum of the squares of `value` in their first columns,
      one for each block of `mosaic_gpu_out`, (N, .) float32.
  """

  value: jax.Array
  scaled: jax.Array
  squares: jax.Array

  @classmethod
  def of(cls, value, norm):
    """That of the first layer."""
    rows, width = value.shape
    squares = jnp.square(value).reshape(rows, width // TILE, -1).sum(axis=2)
    scaled = value * norm.astype(jnp.float32)[None]
    return cls(
      value,
      scaled.astype(jnp.bfloat16),
      jnp.pad(squares, ((0, 0), (0, -squares.shape[1] % PARTIALS))),
    )


# A function of its own, since it is lowered once for all layers.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def layer(
  config, eps, interpret, kernels, heads,
  index, residual, weights, keys, values, lengths, turns, pages,
) -> tuple:  # fmt: skip
  """Takes the residual stream through a layer.

  Args:
    config: A Config.
    eps: Of both norms.
    interpret: False, or the parameters of the interpreter.
    kernels: The products, of `prepare`, as weights.
    heads: H.
    index: Of the layer, (1,) int32.
    residual: In front of it.
    weights: Of all layers.
    keys: As in `transformer_step`.
    values: Alike.
    lengths: (B,) int32, slots that are filled.
    turns: Cosines and sines, (2, N, K / 2).
    pages: As in `transformer_step`, of all layers, or None.

  Returns:
    The residual stream in front of the next layer, and the caches; with pages
    also both parts of the summary of the new tokens' pages, (B, 1, N, K).
  """
  qkv, o, gate_up, down = kernels
  caches = tuple(jax.tree.map(jax.new_ref, (keys, values)))
  normed = {"parts": residual.value.shape[1] // TILE, "eps": eps}
  options = {"interpret": interpret}
  kv_heads = keys.shape[3]
  wide = [weights.gate_proj[0], weights.up_proj[0]]
  wide_ahead = config.ahead, config.gate_up_splits
  q = mosaic_gpu_qkv.project(
    qkv, index, residual, weights, caches, lengths, turns,
    heads=heads, ahead=(config.ahead, config.o_splits), **normed, **options,
  )  # fmt: skip
  shared, last = heads // kv_heads, ()
  if pages is None:
    mixed = mosaic_gpu_attend.attend(
      index, q, caches, lengths + 1, wide, shared=shared,
      splits=config.attend_splits, cluster=config.attend_cluster,
      stages=config.attend_stages, ahead=wide_ahead, **options,
    )  # fmt: skip
  else:
    mixed, *last = mosaic_gpu_paged.attend(
      index, q, caches, lengths + 1, pages, shared=shared, **options
    )
  residual = mosaic_gpu_out.project(
    o, index, mixed, residual.value, weights.mlp_norm, weights.o_proj, wide,
    following=0, name=mosaic_gpu_out.NAMES[0], ahead=wide_ahead, past=1,
    **options,
  )  # fmt: skip
  residual = Residual(*residual)
  middle = mosaic_gpu_gate_up.project(
    gate_up, index, residual, weights, width=down.depth,
    ahead=(config.ahead, config.down_splits), **normed, **options,
  )  # fmt: skip
  residual = mosaic_gpu_out.project(
    down, index, middle, residual.value, weights.attn_norm, weights.down_proj,
    [weights.q_proj[0], weights.k_proj[0], weights.v_proj[0]],
    following=1, name=mosaic_gpu_out.NAMES[1],
    ahead=(config.ahead, config.qkv_splits), past=0, **options,
  )  # fmt: skip
  return Residual(*residual), *jax.tree.map(jax.freeze, caches), *last
