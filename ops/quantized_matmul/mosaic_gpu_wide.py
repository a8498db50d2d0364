"""The choice of the Mosaic GPU kernel for many rows: what it takes, and how."""

import math

import jax
import jax.numpy as jnp

from ops import hopper
from ops.quantized import QTensor
from ops.quantized.quantize import levels
from ops.quantized_matmul import xla
from ops.quantized_matmul.mosaic_gpu_walk import (
  LINE,
  Config,
  Sizes,
  products,
)

# Rows and columns of tiles, and which of both the warpgroups share.
_TILES = ((128, 256, "rows"), (256, 128, "rows"), (128, 128, "rows"))
_TILES_OF_GROUPS = ((128, 128, "rows"), (128, 64, "rows"))
# The same where weights are converted: 64 columns to a warpgroup.
_CONVERTED = (
  (256, 128, "columns"),
  (128, 128, "columns"),
  (256, 64, "rows"),
  (64, 128, "columns"),
  (128, 64, "rows"),
)
_CONVERTED_GROUPS = ((128, 128, "columns"), (64, 128, "columns"))


def configure(
  rows: int,
  depth: int,
  width: int,
  bits: int,
  groups: int,
  operand: jnp.dtype,
  out: jnp.dtype,
) -> Config:
  """Returns the Config for M, D, F, bits of a weight, G and dtypes; pure.

  Tiles are to fill the multiprocessors, and to be large, since what they load
  grows with their edges and what they multiply with their area.
  """
  converted = bits < 8 * operand.itemsize
  if converted:
    choices = _CONVERTED if groups == 1 else _CONVERTED_GROUPS
  else:
    choices = _TILES if groups == 1 else _TILES_OF_GROUPS

  def cost(choice):
    """Of all tiles that a multiprocessor multiplies, one after the other."""
    height, breadth, _ = choice
    tiles = -(-rows // height) * -(-width // breadth)
    waves = -(-tiles // hopper.PROCESSORS)
    return waves * (height * breadth + 24 * (height + breadth))

  height, breadth, split = min(choices, key=cost)

  def sizes(stages):
    return Sizes(
      rows=rows,
      width=width,
      depth=depth,
      groups=groups,
      packed=bits == 4,
      stored=jnp.dtype(jnp.uint8 if bits == 4 else jnp.int8)
      if converted
      else operand,
      operand=operand,
      out=out,
      config=Config(
        rows=height,
        columns=breadth,
        transposed=converted,
        split=split,
        stages=stages,
      ),
      interpret=False,
    )

  fit = [k for k in map(sizes, range(6, 1, -1)) if k.pieces]
  # A second piece is worth more than a fifth chunk.
  return max(fit, key=lambda k: (min(k.config.stages, 4), k.pieces)).config


def unfit(x, w) -> str | None:
  """Returns None if the kernel takes these operands, else why not."""
  if not isinstance(w, QTensor):
    return f"needs weights in a number format, w is {w.dtype}"
  form = w.format
  if not form.symmetric or form.codebook or isinstance(w.scales, QTensor):
    return f"needs levels that are codes of a symmetric format, w is {form}"
  if form.bits != (4 if form.packed else 8):
    return f"needs 8 bits, or 4 in pairs, w is {form}"
  if w.scales.dtype != jnp.float32:
    return f"needs float32 scales, those of w are {w.scales.dtype}"
  if isinstance(x, QTensor):
    if not x.format.symmetric or isinstance(x.scales, QTensor):
      return f"needs levels of a symmetric format, x is {x.format}"
    if x.num_blocks != 1:
      return f"needs one scale a row, x is {x.format}"
    operand = xla.product_dtype(x, w)
    if operand.itemsize != 1:
      return f"needs levels of 8 bits, those of {x.format} and {form} need more"
  else:
    operand = jnp.dtype(jnp.bfloat16)
    if x.dtype != operand:
      return f"needs bfloat16, x is {x.dtype}"
    if not form.is_integer:
      return f"needs levels of an integer grid with a float x, w is {form}"
  depth, width = w.shape
  chunk = LINE // operand.itemsize
  if depth % w.num_blocks or depth // w.num_blocks % chunk:
    return f"needs groups of a multiple of {chunk}, w is {form} {w.shape}"
  if width % 8 or depth > 2**17:
    return f"needs columns by eights, of at most {2**17}, w is {w.shape}"
  return None


def run(x, w, *, dtype, config=None, interpret=False) -> jax.Array:
  """Implements `quantized_matmul` on Hopper; arguments as there.

  `interpret` is False or `InterpretGPUParams`; `config` is by default that of
  `configure`.
  """
  depth, width = w.shape
  rows = math.prod(x.shape[:-1])
  if isinstance(x, QTensor):
    operand = xla.product_dtype(x, w)
    values = levels(x).astype(operand)
    scales = jnp.broadcast_to(x.scales, (*x.shape[:-1], 1))
  else:
    operand, values = x.dtype, x
    scales = jnp.ones((*x.shape[:-1], 1), jnp.float32)
  config = config or configure(
    rows, depth, width, w.format.bits, w.num_blocks, operand, dtype
  )
  y = products(
    values.reshape(rows, depth),
    w.values,
    scales.reshape(rows),
    jnp.broadcast_to(w.scales, (width, w.num_blocks)),
    out=dtype,
    config=config,
    interpret=interpret,
  )
  return y.reshape(*x.shape[:-1], width)
