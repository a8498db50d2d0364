"""The Mosaic GPU `quantized_matmul` for Hopper: weights of few bits.

Here are few rows, where reading the weights takes the time; `mosaic_gpu_wide`
has many, where the matrix unit does. Activations that are quantized too come as
levels, which bfloat16 holds as well as those of the weights. A sum of integers
is exact up to 2^24, as a product of integers would be, and with few rows such a
product would be no faster.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import dispatch, hopper
from ops.hopper_tiles import TILE, compiler_params, store
from ops.quantized import QTensor, as_array
from ops.quantized.quantize import levels, unpack
from ops.quantized_matmul import (
  mosaic_gpu_lookup,
  mosaic_gpu_product,
  mosaic_gpu_wide,
  xla,
)

# Rows of x, beyond which the matrix unit is the limit.
MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched; see `mosaic_gpu_product.Product`."""

  warpgroups: int = 4
  stages: int = 4
  splits: int = 1
  tiles: int = 1


def configure(
  rows: int,
  depth: int,
  width: int,
  bits: int,
  groups: int = 1,
  scale_bytes: int = 4,
  special: bool = False,
) -> Config | None:
  """Returns the Config for M, D, F, bits of a weight, and G; pure.

  A scale takes so many bytes, and a special level of its group as many. None
  where no launch fits the machine.

  Thread blocks are to fill the multiprocessors, with as much of the weights
  under way as shared memory holds, and to read x from the L2 cache and write
  parts of the result as seldom as that allows.
  """
  rows = padded(rows)
  chunk = mosaic_gpu_product.chunk_of(depth, groups)
  chunks = depth // chunk

  def scales(splits):
    """Of a column, that a split keeps."""
    return mosaic_gpu_product.scales_of_split(
      depth, groups, splits, 16 // scale_bytes
    )

  def stages(tiles, splits, warpgroups, each):
    """How many chunks of a ring fit, with `each` blocks a multiprocessor."""
    columns = TILE * tiles
    free = hopper.SHARED_MEMORY // each - 4 * 1024
    free -= scale_bytes * (1 + special) * columns * (scales(splits) + 4)
    ring = free // warpgroups - 4 * rows * (columns + 4)
    return ring // (columns * chunk * bits // 8 + 2 * rows * chunk)

  def cost(choice):
    """Bytes, each weighted by how slowly it moves."""
    tiles, splits, warpgroups, each = choice
    blocks = -(-width // (TILE * tiles))
    waves = -(-blocks * splits // (each * hopper.PROCESSORS))
    idle = waves * each * hopper.PROCESSORS / (blocks * splits)
    weights = depth * width * bits / 8 * (max(idle, 1.0) if waves < 3 else 1.0)
    moved = weights + rows * depth * blocks + 8 * splits * rows * width
    # Few warpgroups wait for their own products.
    return moved * (1 + 0.5 / (warpgroups * each))

  choices = [
    (tiles, splits, warpgroups, each)
    for tiles in (1, 2)
    for splits in (1, 2, 4, 8)
    for warpgroups in (4, 2, 1)
    for each in (1, 2)
    if splits * warpgroups <= chunks
    and scales(splits) <= mosaic_gpu_product.MOST_SCALES
    and stages(tiles, splits, warpgroups, each) >= 2
  ]
  # A split whose scales begin amid 16 bytes copies those in front of them too,
  # so such splits, and full copies, are for sizes that nothing else fits.
  aligned = [
    choice
    for choice in choices
    if scales(choice[1]) < mosaic_gpu_product.MOST_SCALES
    and (groups == 1 or groups % (4 * choice[1]) == 0 or choice[1] == 1)
  ]
  if not choices:
    return None
  tiles, splits, warpgroups, each = min(aligned or choices, key=cost)
  most = max(2, -(-chunks // (splits * warpgroups)))
  fit = stages(tiles, splits, warpgroups, each)
  return Config(
    warpgroups=warpgroups, stages=min(fit, 4, most), splits=splits, tiles=tiles
  )


def padded(rows: int) -> int:
  """N, the tokens that the matrix unit sees for M rows."""
  return -(-rows // 8) * 8


def supports(x=None, w=None) -> str | None:
  """Returns None where `forward` runs on these arguments, else why not."""
  if reason := dispatch.needs_wgmma():
    return reason
  if x is None:
    return None
  return unfit(x, w)


def _many(x) -> bool:
  """Whether the rows of x are too many for the kernel of this module."""
  return math.prod(x.shape[:-1]) > MAX_ROWS


def unfit(x, w) -> str | None:
  """Returns None if a kernel takes these operands, else why not."""
  if _many(x):
    return mosaic_gpu_wide.unfit(x, w)
  if reason := unfit_weight(w, codebooks=True):
    return reason
  if _configured(math.prod(x.shape[:-1]), w) is None:
    return f"needs scales that fit shared memory, w is {w.format} {w.shape}"
  if isinstance(x, QTensor):
    form = x.format
    if not (form.is_integer and form.symmetric) or isinstance(
      x.scales, QTensor
    ):
      return f"needs levels of a symmetric integer grid, x is {form}"
    if x.num_blocks != 1:
      return f"needs one scale a row, x is {form}"
    if not mosaic_gpu_lookup.is_exact(w.format):
      return f"needs levels of bfloat16 for an x of few bits, w is {w.format}"
  elif x.dtype != jnp.bfloat16:
    return f"needs bfloat16, x is {x.dtype}"
  return None


def unfit_weight(w, *, codebooks: bool = False) -> str | None:
  """Returns None if kernels take this weight, (..., D, F), else why not.

  Args:
    w: the weight.
    codebooks: whether the kernel looks levels up, and takes scales of 16 bits
      or of a second level.
  """
  if not isinstance(w, QTensor):
    return f"needs weights in a number format, w is {w.dtype}"
  form, scales = w.format, w.scales
  grid = form.is_integer and form.symmetric
  small = codebooks and form.bits == 4 and _is_small(w)
  if codebooks and form.codebook is not None:
    if form.fitted:
      return f"needs levels that are the same in all weights, w is {form}"
    if form.specials and w.num_blocks == 1:
      return f"needs several groups that choose a level, w is {form} {w.shape}"
  elif not grid or (isinstance(scales, QTensor) and not small):
    return f"needs levels of a symmetric integer grid, w is {form}"
  if form.bits != (4 if form.packed else 8):
    return f"needs 8 bits, or 4 in pairs, w is {form}"
  if small and not mosaic_gpu_lookup.scales_are_exact(form):
    return f"needs scales of small groups that bfloat16 multiplies, w is {form}"
  if small:
    if w.shape[-1] % 8:
      return f"needs columns of a multiple of 8, w is {w.shape}"
    return mosaic_gpu_product.unfit(w.shape[-2], w.num_blocks, small=True)
  widths = (jnp.float32, jnp.bfloat16) if codebooks else (jnp.float32,)
  if scales.dtype not in widths:
    return f"needs scales of 32 or 16 bits, those of w are {scales.dtype}"
  if w.shape[-1] % 8:
    return f"needs columns of a multiple of 8, w is {w.shape}"
  return mosaic_gpu_product.unfit(w.shape[-2], w.num_blocks)


def _is_small(w: QTensor) -> bool:
  """Whether several groups of a weight lie in a chunk."""
  return w.shape[-2] // w.num_blocks in mosaic_gpu_product.SMALL


def forward(x, w, *, dtype, interpret=False, config=None) -> jax.Array:
  """Implements `quantized_matmul` on Hopper; arguments as there.

  `interpret` is False or `InterpretGPUParams`; `config` is one of this module
  or of `mosaic_gpu_wide`, by default that of `configure` there.
  """
  if reason := unfit(x, w):
    raise ValueError(f"quantized_matmul: the Mosaic GPU kernel {reason}")
  return _forward(x, w, jnp.dtype(dtype), config, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _forward(x, w, dtype, config, interpret):
  if _many(x):
    return mosaic_gpu_wide.run(
      x, w, dtype=dtype, config=config, interpret=interpret
    )
  rows, (depth, width) = math.prod(x.shape[:-1]), w.shape
  values = levels(x).astype(jnp.bfloat16) if isinstance(x, QTensor) else x
  values = values.reshape(rows, depth)
  scales, factor = _scales(w)
  config = config or _configured(rows, w)
  looked_up = w.format.codebook is not None or _is_small(w)
  y = _products(
    jnp.pad(values, ((0, padded(rows) - rows), (0, 0))),
    w.values,
    jnp.broadcast_to(scales, (width, w.num_blocks)),
    _special(w, scales.dtype),
    table=mosaic_gpu_lookup.table_of(w.format) if looked_up else None,
    config=config,
    interpret=interpret,
  )
  y = jnp.sum(y, axis=0)[:rows, :width]
  if factor is not None:
    y = y * jnp.broadcast_to(factor.T, y.shape)
  if isinstance(x, QTensor):
    scales = jnp.broadcast_to(x.scales, (*x.shape[:-1], 1))
    y = y * jnp.broadcast_to(scales.reshape(rows, 1), y.shape)
  return y.astype(dtype).reshape(*x.shape[:-1], width)


def _configured(rows: int, w: QTensor) -> Config | None:
  """The Config for a weight, or None where no launch fits the machine."""
  two_bytes = _is_small(w) or as_array(w.scales).dtype == jnp.bfloat16
  return configure(
    rows,
    *w.shape[-2:],
    w.format.bits,
    w.num_blocks,
    scale_bytes=2 if two_bytes else 4,
    special=bool(w.format.specials),
  )


def _scales(w):
  """Scales (F or 1, G) of groups, and a factor (F or 1, 1) of columns or None.

  Scales of small groups multiply levels in bfloat16, which holds them; what a
  second level has beside waits for the sum.
  """
  if not _is_small(w) or not isinstance(w.scales, QTensor):
    scales = as_array(w.scales)
    return scales.astype(jnp.bfloat16) if _is_small(w) else scales, None
  return levels(w.scales).astype(jnp.bfloat16), w.scales.scales


def _special(w, dtype):
  """The levels (F, G) that groups have for themselves, or None."""
  if not w.format.specials:
    return None
  choices = unpack(w.choices, w.format.choices, w.num_blocks)
  found = jnp.asarray(w.format.specials, dtype)[choices]
  return jnp.broadcast_to(found, (w.shape[-1], w.num_blocks))


def _forward_fwd(x, w, dtype, config, interpret):
  return _forward(x, w, dtype, config, interpret), (x, w)


def _forward_bwd(dtype, config, interpret, kept, dy):
  del config, interpret
  x, w = kept
  if isinstance(x, QTensor):
    return None, None
  _, pull = jax.vjp(lambda x: xla.forward(x, w, dtype=dtype), x)
  return *pull(dy), None


_forward.defvjp(_forward_fwd, _forward_bwd)


# A function of its own, since it is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("table", "config", "interpret"))
def _products(x, w, scales, special, *, table, config, interpret):
  """Multiplies by weights as QTensors keep them.

  Args:
    x: (N, D) bfloat16, N a multiple of 8.
    w: (F, D) int8, or (F, D / 2) uint8 with two levels of 4 bits a byte.
    scales: (F, G) float32 or bfloat16.
    special: (F, G) levels of the last code, of the same dtype, or None.
    table: Bits of levels where codes are indices, or None.
    config: A Config.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (splits, N, columns) float32, whose sum over splits is the product, with
    columns of no weight behind the F.
  """
  product = mosaic_gpu_product.Product(
    rows=x.shape[0],
    depth=x.shape[1],
    groups=scales.shape[1],
    packed=w.dtype == jnp.uint8,
    table=table,
    special=special is not None,
    scale_dtype=scales.dtype,
    interpret=bool(interpret),
    **dataclasses.asdict(config),
  )
  blocks = -(-w.shape[0] // product.columns)
  width = blocks * product.columns

  def kernel(x_ref, *refs, **s):
    *refs, out_ref = refs
    column = lax.axis_index("columns") * product.columns
    split = lax.axis_index("splits")

    def finish(value, _):
      store(out_ref.at[split, :, pl.ds(column, product.columns)], value)

    product.run(
      x_ref, refs, column, s,
      split=split, prepare=lambda me: (None, ()), finish=finish,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(
      (config.splits, x.shape[0], width), jnp.float32
    ),
    grid=(blocks, config.splits),
    grid_names=("columns", "splits"),
    **product.launch(),
    scratch_types=product.scratch(),
    kernel_name="quantized_matmul",
    compiler_params=compiler_params(),
    interpret=interpret,
  )
  return run(x, *product.operands(w, scales, width, special))
