"""The Mosaic GPU `quantized_matmul` for Hopper: few rows, weights of few bits.

With few rows the time is that of reading the weights. So the kernel reads them
in the bits that they are kept in, and many chunks ahead of their use. Hopper's
matrix unit (wgmma) takes one operand from registers, where 4-bit and 8-bit
levels become bfloat16, which holds them exactly. That operand has 64 rows, of
which few tokens would waste most: the product is transposed, so that columns of
the weights are its rows, and any multiple of 8 tokens its columns.

Several warpgroups of a thread block take chunks of the summed axis in turn,
each with a ring of its own in shared memory: one converts while others
multiply. The sums of a chunk, float32, are multiplied by the scale of its
group, so scales are never rounded. At last the warpgroups add up through shared
memory, and where several thread blocks share the summed axis, XLA adds up their
results.

Activations that are quantized too come as levels, which bfloat16 holds as well.
A sum of integers is exact up to 2^24, as a product of integers would be, and
with few rows such a product would be no faster.
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
from ops.hopper_tiles import (
  ROWS,
  SUMS,
  TILE,
  compiler_params,
  load,
  store,
)
from ops.quantized import QTensor, formats
from ops.quantized.quantize import levels, unpack
from ops.quantized_matmul import xla

# Rows of x, beyond which the matrix unit would be the limit.
MAX_ROWS = 128
# Of the summed axis, that a warpgroup takes at a time.
CHUNK = 128
_LAYOUT = plgpu.Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched.

  Attributes:
    warpgroups: Of a thread block, which take chunks in turn.
    stages: Chunks in the ring of each.
    splits: Thread blocks that share the summed axis.
    tiles: Of 64 columns of the weights, of a thread block.
  """

  warpgroups: int = 4
  stages: int = 4
  splits: int = 1
  tiles: int = 1


def configure(rows: int, depth: int, width: int, bits: int) -> Config:
  """Returns the Config for M, D, F and the bits of a weight; pure.

  Thread blocks are to fill the multiprocessors once, with as much of the
  weights under way as shared memory holds.
  """
  rows = padded(rows)
  chunks = depth // chunk_of(depth)
  warpgroups = min(4 if rows <= 32 else 2, chunks)

  def blocks(tiles, splits):
    return -(-width // (TILE * tiles)) * splits

  def idle(choice):
    """The share of the machine that waits for the last thread blocks."""
    count = blocks(*choice)
    waves = -(-count // hopper.PROCESSORS)
    return waves * hopper.PROCESSORS / count

  choices = [
    (tiles, splits)
    for tiles in (2, 1)
    for splits in (1, 2, 4, 8)
    if splits * warpgroups <= chunks
  ]
  tiles, splits = min(choices, key=lambda one: (round(idle(one), 1), one[1]))
  waves = -(-blocks(tiles, splits) // hopper.PROCESSORS)
  sums = 4 * rows * (TILE * tiles + 4)
  chunk = chunk_of(depth)
  stage = TILE * tiles * chunk * bits // 8 + 2 * rows * chunk
  room = hopper.SHARED_MEMORY // min(waves, 2) - 8 * 1024
  stages = (room // warpgroups - sums) // stage
  most = -(-chunks // (splits * warpgroups))
  return Config(
    warpgroups=warpgroups,
    stages=max(2, min(stages, 4, most)),
    splits=splits,
    tiles=tiles,
  )


def padded(rows: int) -> int:
  """N, the tokens that the matrix unit sees for M rows."""
  return -(-rows // 8) * 8


def chunk_of(group: int) -> int:
  """The chunk of the summed axis for groups of so many values."""
  return CHUNK if group % CHUNK == 0 else 64


def supports(x=None, w=None) -> str | None:
  """Returns None where `forward` runs on these arguments, else why not."""
  if reason := dispatch.needs_wgmma():
    return reason
  return None if x is None else unfit(x, w)


def unfit(x, w) -> str | None:
  """Returns None if the kernel takes these operands, else why not."""
  if not isinstance(w, QTensor):
    return f"needs weights in a number format, w is {w.dtype}"
  for name, a in (("w", w), ("x", x)):
    if isinstance(a, QTensor):
      form = a.format
      if not (form.is_integer and form.symmetric):
        return f"needs levels of a symmetric integer grid, {name} is {form}"
      if isinstance(a.scales, QTensor):
        return f"needs scales of one level, {name} is {form}"
    elif a.dtype != jnp.bfloat16:
      return f"needs bfloat16, {name} is {a.dtype}"
  if isinstance(x, QTensor) and x.scales.shape[-1] != 1:
    return f"needs one scale a row, x is {x.format}"
  if w.format.bits != (4 if w.format.packed else 8):
    return f"needs 8 bits, or 4 in pairs, w is {w.format}"
  if math.prod(x.shape[:-1]) > MAX_ROWS:
    return f"needs at most {MAX_ROWS} rows, x is {x.shape}"
  depth, width = w.shape
  if width % 8:
    return f"needs columns of a multiple of 8, w is {w.shape}"
  if depth // w.scales.shape[0] % 64:
    return f"needs groups of a multiple of 64, w is {w.format} of {w.shape}"
  return None


def forward(x, w, *, dtype, interpret=False, config=None) -> jax.Array:
  """Implements `quantized_matmul` on Hopper; arguments as there.

  Weights that are kept as (F, D), and given as their transpose, are read where
  they lie. `interpret` is False or `InterpretGPUParams`; `config` is by default
  that of `configure`.
  """
  if reason := unfit(x, w):
    raise ValueError(f"quantized_matmul: the Mosaic GPU kernel {reason}")
  return _forward(x, w, jnp.dtype(dtype), config, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _forward(x, w, dtype, config, interpret):
  rows, (depth, width) = math.prod(x.shape[:-1]), w.shape
  values = levels(x).astype(jnp.bfloat16) if isinstance(x, QTensor) else x
  values = values.reshape(rows, depth)
  config = config or configure(rows, depth, width, w.format.bits)
  stored = w.T
  y = _products(
    jnp.pad(values, ((0, padded(rows) - rows), (0, 0))),
    stored.values,
    None if w.scales.shape[0] == 1 else stored.scales,
    config=config,
    interpret=interpret,
  )
  y = jnp.sum(y, axis=0)[:rows, :width]
  # One scale for all of the summed axis follows the sum.
  if w.scales.shape[0] == 1:
    y = y * jnp.broadcast_to(w.scales, y.shape)
  if isinstance(x, QTensor):
    shape = *x.shape[:-1], 1
    scales = jnp.broadcast_to(x.scales, shape).reshape(rows, 1)
    y = y * jnp.broadcast_to(scales, y.shape)
  return y.astype(dtype).reshape(*x.shape[:-1], width)


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
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _products(x, w, scales, *, config, interpret):
  """Multiplies by weights that are kept as rows of the summed axis.

  Args:
    x: (N, D) bfloat16, N a multiple of 8.
    w: (F, D) int8, or (F, D / 2) uint8 with two levels of 4 bits a byte.
    scales: (F, G) float32, or None, where they are applied to the result.
    config: A Config.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (splits, N, columns) float32, whose sum over splits is the product, with
    columns of no weight behind the F.
  """
  rows, depth = x.shape
  count = 1 if scales is None else scales.shape[1]
  chunk = chunk_of(depth // count)
  # Chunks of a scale, scales of a split, and chunks of a split. TMA takes whole
  # 16 bytes, so the scales of a split are a multiple of 4.
  per, chunks = depth // count // chunk, depth // chunk
  if scales is None:
    share, scales_of_split = -(-chunks // config.splits), 0
  else:
    scales_of_split = 4 * -(-count // (4 * config.splits))
    share = scales_of_split * per
    scales = jnp.pad(scales, ((0, 0), (0, -count % 4)))
  columns = TILE * config.tiles
  blocks = -(-w.shape[0] // columns)
  if interpret:
    # Where TMA would fill up with zeros, the interpreter has no memory.
    beyond = ((0, blocks * columns - w.shape[0]), (0, 0))
    w = jnp.pad(w, beyond)
    if w.dtype == jnp.uint8:
      # Nor does it see one memory as numbers of two kinds.
      w = unpack(w, formats.get("int4"), -1, depth).astype(jnp.int4)
    if scales is not None:
      behind = scales_of_split * config.splits - scales.shape[1]
      scales = jnp.pad(scales, (beyond[0], (0, behind)))
  body = _Body(
    config=config,
    rows=rows,
    chunk=chunk,
    chunks=chunks,
    share=share,
    per=per,
    packed=w.dtype == jnp.uint8,
    scales=scales_of_split,
    interpret=bool(interpret),
  )
  run = plgpu.kernel(
    body.run,
    out_type=jax.ShapeDtypeStruct(
      (config.splits, rows, blocks * columns), jnp.float32
    ),
    grid=(blocks, config.splits),
    grid_names=("columns", "splits"),
    num_threads=config.warpgroups,
    thread_name="warpgroup",
    scratch_types=body.scratch(w.dtype),
    kernel_name="quantized_matmul",
    compiler_params=compiler_params(),
    interpret=interpret,
  )
  return run(x, w, *([] if scales is None else [scales]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
  """The kernel of a thread block.

  Attributes:
    config: As the next three, see `_products`.
    rows: N.
    chunk: Of the summed axis, that a warpgroup takes at a time.
    chunks: Of the whole axis.
    share: Chunks of a split; the last one has the rest.
    per: Chunks of a scale.
    packed: Whether weights come as bytes of two levels.
    scales: Of a row of weights in a split, or 0.
    interpret: Whether the kernel is interpreted. The interpreter knows no
      operand in registers: a plain product stands in for it.
  """

  config: Config
  rows: int
  chunk: int
  chunks: int
  share: int
  per: int
  packed: bool
  scales: int
  interpret: bool

  def scratch(self, dtype) -> dict:
    """Shared memory and barriers of a thread block."""
    c, chunk, columns = self.config, self.chunk, TILE * self.config.tiles
    ring = c.warpgroups, c.stages

    def tiles(height, width, dtype, bits):
      swizzle = min(width * bits // 8, 128)
      return plgpu.SMEM(
        (*ring, height, width),
        dtype,
        transforms=(
          plgpu.TilingTransform((8, swizzle * 8 // bits)),
          plgpu.SwizzleTransform(swizzle),
        ),
      )

    if self.packed:
      # TMA copies bytes, which are then read as pairs of levels.
      weights = plgpu.RefUnion(
        tiles(columns, chunk // 2, dtype, 8),
        tiles(columns, chunk, jnp.int4, 4),
      )
    else:
      weights = tiles(columns, chunk, dtype, 4 if dtype == jnp.int4 else 8)
    scratch = {
      "w": weights,
      "x": tiles(self.rows, chunk, jnp.bfloat16, 16),
      # Four more than needed let the threads of a warp store to all banks.
      "sums": plgpu.SMEM((c.warpgroups, self.rows, columns + 4), jnp.float32),
      "loaded": plgpu.Barrier(
        num_arrivals=2, num_barriers=c.warpgroups * c.stages
      ),
      "done": plgpu.Barrier(num_arrivals=c.warpgroups),
    }
    if self.scales:
      scratch["scales"] = plgpu.SMEM((columns, self.scales), jnp.float32)
      scratch["scales_loaded"] = plgpu.Barrier()
    return scratch

  def run(self, x_ref, w_ref, *refs, **s):
    """Multiplies a block of columns over a split of the summed axis."""
    *scales_ref, out_ref = refs
    me = lax.axis_index("warpgroup")
    column = lax.axis_index("columns") * (TILE * self.config.tiles)
    split = lax.axis_index("splits")
    if self.scales:

      @pl.when(me == 0)
      def _():
        plgpu.copy_gmem_to_smem(
          scales_ref[0].at[
            pl.ds(column, TILE * self.config.tiles),
            pl.ds(split * self.scales, self.scales),
          ],
          s["scales"],
          s["scales_loaded"],
        )

    totals = self.totals(x_ref, w_ref, me, column, split, s)
    self.add_up(totals, me, column, out_ref.at[split], s)

  def totals(self, x_ref, w_ref, me, column, split, s) -> tuple:
    """The sums of a warpgroup over its chunks, a (TILE, N) for each tile."""
    c, chunk = self.config, self.chunk
    # What TMA writes, and how it is read.
    bytes_s, codes_s = s["w"] if self.packed else (s["w"], s["w"])
    width = bytes_s.shape[-1]
    first = split * self.share
    end = jnp.minimum(first + self.share, self.chunks)
    # Of this warpgroup, which takes every so manyth chunk.
    steps = lax.div(end - first - me + c.warpgroups - 1, c.warpgroups)

    def fetch(i, slot):
      at = first + i * c.warpgroups + me
      barrier = s["loaded"].at[me * c.stages + slot]
      plgpu.copy_gmem_to_smem(
        w_ref.at[pl.ds(column, TILE * c.tiles), pl.ds(at * width, width)],
        bytes_s.at[me, slot],
        barrier,
      )
      plgpu.copy_gmem_to_smem(
        x_ref.at[:, pl.ds(at * chunk, chunk)], s["x"].at[me, slot], barrier
      )

    for i in range(c.stages):

      @pl.when(i < steps)
      def _(i=i):
        fetch(jnp.int32(i), i)

    if self.scales:
      plgpu.barrier_wait(s["scales_loaded"])

    def step(i, totals):
      slot = lax.rem(i, jnp.int32(c.stages))
      plgpu.barrier_wait(s["loaded"].at[me * c.stages + slot])
      found = []
      for t, total in enumerate(totals):
        own = pl.ds(t * TILE, TILE)
        part = self.product(codes_s.at[me, slot, own], s["x"].at[me, slot])
        if self.scales:
          scale = lax.div(i * c.warpgroups + me, jnp.int32(self.per))
          part *= self.of_rows(s["scales"].at[own, scale])
        found.append(total + part)

      @pl.when(i + c.stages < steps)
      def _():
        fetch(i + c.stages, slot)

      return tuple(found)

    zero = plgpu.layout_cast(
      jnp.zeros((TILE, self.rows), jnp.float32), _LAYOUT.WGMMA
    )
    return lax.fori_loop(jnp.int32(0), steps, step, (zero,) * c.tiles)

  def product(self, codes, x) -> jax.Array:
    """Multiplies a tile (TILE, chunk) of weights by x.T: (TILE, N) float32."""
    # A thread loads 32 bits at a time, and gets others' levels as wgmma wants.
    layout = _LAYOUT.WGMMA_UPCAST_2X
    if codes.dtype == jnp.int4:
      layout = _LAYOUT.WGMMA_UPCAST_4X
    values = plgpu.load(codes, layout=layout, optimized=False)
    values = plgpu.layout_cast(values, _LAYOUT.WGMMA).astype(jnp.bfloat16)
    if self.interpret:
      return jnp.dot(values, x[...].T, preferred_element_type=jnp.float32)

    def multiply(sums):
      plgpu.wgmma(sums, values, x.T)
      plgpu.wgmma_wait(0)
      return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE, self.rows), jnp.float32))

  def of_rows(self, ref) -> jax.Array:
    """One number a row of a tile, spread over (TILE, N)."""
    value = plgpu.load(ref, layout=_LAYOUT.WGMMA.reduce(1), optimized=False)
    value = lax.broadcast_in_dim(value, (TILE, self.rows), (0,))
    return plgpu.layout_cast(value, _LAYOUT.WGMMA)

  def add_up(self, totals, me, column, out_ref, s):
    """Adds up the warpgroups, and stores their sums as whole rows."""
    for t, total in enumerate(totals):
      own = s["sums"].at[me, :, pl.ds(t * TILE, TILE)]
      store(own.T, plgpu.layout_cast(total, SUMS))
    plgpu.barrier_arrive(s["done"])
    plgpu.barrier_wait(s["done"])

    @pl.when(me == 0)
    def _():
      for t in range(self.config.tiles):
        value = sum(
          load(s["sums"].at[g, :, pl.ds(t * TILE, TILE)], ROWS)
          for g in range(self.config.warpgroups)
        )
        store(out_ref.at[:, pl.ds(column + t * TILE, TILE)], value)
