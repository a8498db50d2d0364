"""The kernels of `ssd` that sum along the tokens of chunks.

A row is one chunk of one head. A thread block takes 64 rows, and sums along
them are products with triangles of ones, in bfloat16 on the matrix units: three
bfloat16 make up a float32, and their products with ones are exact.
"""

from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops.ssd import mosaic_gpu_tiles as tiles
from ops.ssd.mosaic_gpu_tiles import CHUNK, TILE

LOG2E = float(np.log2(np.e))
_SQUARE = (CHUNK, CHUNK)


def chunk_decays(log_decay, dt, *, interpret=False) -> jax.Array:
  """Returns what a chunk needs of its decays, (B, H, L / CHUNK, 3, CHUNK).

  They are the log decay from the start of the chunk to each token, cum; cum -
  log dt, so that exp(cum_I - it_J) has dt_J in it; and dt. Logs have base 2.

  Args:
    log_decay: (B, H, L) float32, from -128 to 0, whole chunks.
    dt: (B, H, L) float32.
    interpret: False, or the parameters of the interpreter.
  """

  def work(until, log_decay, dt):
    # Whole numbers, at most 185, are summed apart and without an error, so that
    # cum is rounded once, however low it is.
    log_decay *= LOG2E
    whole = log_decay.astype(jnp.int32).astype(jnp.float32)

    def sums(add, read):
      for part in _parts(log_decay - whole):
        add(0, part, until)
      add(1, whole.astype(jnp.bfloat16), until)
      return read(0, 1) + read(1, 0)

    cum = tiles.products((_SQUARE, _SQUARE), sums, interpret)
    return cum, cum - jnp.log2(dt), dt

  b, h, length = dt.shape
  decays = _over_rows(
    work,
    [v.reshape(-1, 1, CHUNK) for v in (log_decay, dt)],
    lines=3,
    triangles=[lambda i, j: i <= j],
    name="ssd_fwd_decays",
    interpret=interpret,
  )
  return decays.reshape(b, h, length // CHUNK, 3, CHUNK)


def decay_gradients(sums, *, interpret=False) -> jax.Array:
  """Returns the gradient of log_decay, (B, H, L) float32.

  That of a token is the sum of what comes into it and into later tokens of the
  chunk, less what only begins there, of what goes out of earlier tokens, and of
  all that crosses the chunk.

  Args:
    sums: (B, H, L / CHUNK, 4, CHUNK) float32, see
      `mosaic_gpu_backward.chunk_gradients`.
    interpret: False, or the parameters of the interpreter.
  """

  def work(since, before, into, across, within, out):
    def body(add, read):
      for inner, outer in zip(_parts(into - within), _parts(out)):
        add(0, inner, since)
        add(0, outer, before)
      return read(0, 0)

    gradient = tiles.products((_SQUARE,), body, interpret)
    return (gradient + tiles.rows(across.sum(1), CHUNK),)

  gradient = _over_rows(
    work,
    [sums.reshape(-1, 4, CHUNK)],
    lines=1,
    triangles=[lambda i, j: i >= j, lambda i, j: i < j],
    name="ssd_bwd_decays",
    interpret=interpret,
  )
  return gradient.reshape(*sums.shape[:2], -1)


def _parts(v: jax.Array) -> list[jax.Array]:
  """Three bfloat16 tiles whose sum is the float32 tile v, the lowest first."""
  parts = []
  for _ in range(3):
    # Cut off, not rounded: compilers may leave out a rounding and its reverse.
    bits = lax.bitcast_convert_type(v, jnp.int32) & -(2**16)
    part = lax.bitcast_convert_type(bits, jnp.float32)
    parts.insert(0, part.astype(jnp.bfloat16))
    v -= part
  return parts


def _over_rows(
  work: Callable, arrays, *, lines: int, triangles, name: str, interpret
) -> jax.Array:
  """Returns the results of `work`, (R, lines, CHUNK).

  Args:
    work: From triangles, then tiles of 64 rows of each line of each array, to
      tiles of the lines of the result.
    arrays: (R, lines, CHUNK) float32 each.
    lines: Of the result.
    triangles: For each one `mask(i, j)`, where it is 1 and not 0.
    name: Of the kernel.
    interpret: False, or the parameters of the interpreter.
  """
  count = arrays[0].shape[0]
  missing = max(CHUNK - count, 0)
  if missing:
    arrays = [jnp.pad(v, [(0, missing), (0, 0), (0, 0)]) for v in arrays]
  rows = count + missing

  def kernel(*refs, ones):
    *array_refs, result_ref = refs
    # The last block goes over some rows of the one before it again.
    first = jnp.minimum(lax.axis_index("block") * CHUNK, rows - CHUNK)
    own = pl.ds(first, CHUNK)
    loaded = [
      plgpu.load(ref.at[own, line], layout=TILE, optimized=False)
      for ref in array_refs
      for line in range(ref.shape[1])
    ]
    i, j = tiles.token_ids()
    for k, mask in enumerate(triangles):
      ones[k] = jnp.where(mask(i, j), 1.0, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()
    results = work(*(ones.at[k] for k in range(len(triangles))), *loaded)
    for line, result in enumerate(results):
      result_ref[own, line] = result

  run = plgpu.kernel(
    kernel,
    out_type=tiles.struct((rows, lines, CHUNK), jnp.float32),
    scratch_types={"ones": tiles.tile(len(triangles), CHUNK, CHUNK)},
    grid=(-(-rows // CHUNK),),
    grid_names=("block",),
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )
  return run(*arrays)[:count]
