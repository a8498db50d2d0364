"""The Mosaic GPU `butterfly_matmul` for Hopper: forward, backward, binding.

On an H200 all of them were right (errors of 2.3e-3 to 3.4e-3 at 256 to 4,096
channels, forward and backward), and took, in ms, beside a dense product and the
merged products of XLA:

  rows x channels    forward   dense  merged    both   dense  merged
  65536 x 1024          .093    .192             .46     .58
  4096 x 4096           .070            .070     .39             .45
  32768 x 4096          .383    1.44    .44     3.54    4.22    3.41
  32768 x 2048          .296     .41    .232            1.08    1.37

Both passes of 32,768 x 4,096 were measured when the forward one took .57, those
of 4,096 x 4,096 before the gradient of wide mixes was a product of XLA's.
`tuning.kernels_pay` says where `butterfly_matmul` takes the kernels by itself.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.butterfly_matmul import mosaic_gpu_gradients as gradients
from ops.butterfly_matmul import mosaic_gpu_product as products
from ops.butterfly_matmul import mosaic_gpu_resident as resident
from ops.butterfly_matmul.mosaic_gpu_product import WIDE

# Stages that blocks of 64 channels merge.
SMALL = 6
# Rows are padded to a multiple of it, because TMA takes them by eights.
_ROWS = 8
# How products of n channels are launched, by n; of 1,024 channels, those alone
# of which some are not wanted.
CONFIGS = {
  128: products.Config(rows=32, each=1),
  256: products.Config(rows=32),
  512: products.Config(rows=32),
  1024: products.Config(),
  2048: products.Config(rows=32, cluster=4, each=1),
  4096: products.Config(rows=32, cluster=8, each=1, blocks=120),
}
# Those of decreasing strides, as gradients of increasing ones have them, where
# they are others: at 32,768 x 4,096 tiles of 16 rows took .56 ms, of 32 .63.
DECREASING = {4096: products.Config(rows=16, cluster=8, each=1, blocks=120)}


def supports(x=None, twiddle=None, **options) -> str | None:
  """Returns why the kernels do not run, or None."""
  del options
  reason = dispatch.needs_wgmma()
  if reason is not None or x is None:
    return reason
  return unfit(x, twiddle)


def unfit(x: jax.Array, twiddle: jax.Array) -> str | None:
  """Returns why these arrays do not fit the kernels, or None."""
  n = 2 * twiddle.shape[3]
  if x.dtype != jnp.bfloat16:
    return f"takes bfloat16, not {x.dtype}"
  if jnp.issubdtype(twiddle.dtype, jnp.complexfloating):
    return "takes no complex twiddles"
  if n not in CONFIGS:
    return f"takes 128 to 4096 channels, padded, not {n}"
  if not x.size:
    return "takes at least one row"
  return None


def forward(
  x: jax.Array,
  twiddle: jax.Array,
  *,
  out_features: int,
  increasing_stride: bool,
  interpret=False,
) -> jax.Array:
  """Implements `butterfly_matmul`; arguments as in `ops`."""
  stacks, blocks, _, half = twiddle.shape[:4]
  lead, features = x.shape[:-1], x.shape[-1]
  rows, n = math.prod(lead), 2 * half
  beyond = -rows % _ROWS
  y = jnp.pad(x.reshape(rows, features), ((0, beyond), (0, n - features)))
  for block in range(blocks):
    increasing = increasing_stride ^ bool(block % 2)
    last = stacks == 1 and block == blocks - 1 and increasing
    y = butterfly(
      y, twiddle[:, block], out_features if last else n, increasing, interpret
    )
  return y[:rows, :out_features].reshape(*lead, out_features)


def factors(twiddle, increasing):
  """The blocks (H, 64, 64) and mixes (log2 H, H / 2, 2, 2, 64) of a butterfly.

  Args:
    twiddle: (log2 n, n / 2, 2, 2) float32.
    increasing: Whether the smallest stride comes first.
  """
  stages, half = twiddle.shape[:2]
  small = twiddle if increasing else twiddle[::-1]
  small = small[:SMALL].reshape(SMALL, -1, WIDE // 2, 2, 2)
  blocks = math.prod(_entries(small, increasing))
  large = twiddle[SMALL:] if increasing else twiddle[: stages - SMALL]
  mixes = large.reshape(-1, half // WIDE, WIDE, 2, 2)
  return blocks, mixes.transpose(0, 1, 3, 4, 2)


def _axes(bits, bit):
  """Of the bits above, at, and below this one, in i and then in j."""
  each = (1 << (bits - 1 - bit), 2, 1 << bit)
  return (*each, *each)


def _entries(twiddle, increasing):
  """By stage, the twiddle that each entry of a matrix takes of it.

  An entry (i, j) is a product of one twiddle a stage: bit after bit the input's
  number j becomes the output's i, and a stage takes the twiddle of the number
  on its way.

  Args:
    twiddle: (B, N, R / 2, 2, 2) with R = 2^B, from the smallest stride on.
    increasing: Whether the smallest stride comes first.

  Returns:
    B of (N, R, R), of (out, in).
  """
  bits, count = twiddle.shape[:2]
  found = []
  for bit, own in enumerate(twiddle):
    axes = _axes(bits, bit)
    own = own.reshape(count, axes[0], axes[2], 2, 2)
    # Bits that have been passed are the output's, the others the input's.
    if increasing:
      own = own.transpose(0, 3, 2, 1, 4)[:, None, :, :, :, :, None]
    else:
      own = own.transpose(0, 1, 3, 4, 2)[:, :, :, None, None]
    own = jnp.broadcast_to(own, (count, *axes))
    found.append(own.reshape(count, 1 << bits, 1 << bits))
  return found


def entry_gradients(dmatrix, twiddle, increasing):
  """The gradients of the twiddles whose products are a matrix's entries.

  A twiddle's gradient is a sum, over the entries that have it, of their
  gradients times the other twiddles. All stages are one sum here: a few
  kernels, where JAX's own gradient of stage after stage takes a dozen in a row.

  Args:
    dmatrix: (N, R, R) float32.
    twiddle: As in `_entries`.
    increasing: Whether the smallest stride comes first.

  Returns:
    As twiddle.
  """
  bits, count = twiddle.shape[:2]
  entries, terms = _entries(twiddle, increasing), []
  for bit in range(bits):
    others = (e for other, e in enumerate(entries) if other != bit)
    term = math.prod(others, start=dmatrix).reshape(count, *_axes(bits, bit))
    order = (0, 4, 3, 2, 5, 1, 6) if increasing else (0, 1, 6, 2, 5, 3, 4)
    term = term.transpose(order)
    terms.append(term.reshape(*twiddle.shape[1:], -1))
  return jnp.stack(terms).sum(axis=-1)


def _twiddle_gradient(dblocks, dmatrix, twiddle, increasing):
  """The gradient of (S, log2 n, n / 2, 2, 2) of the matrices of both kernels.

  Args:
    dblocks: (S H, 64, 64) float32.
    dmatrix: (S, H, H, 64) float32.
    twiddle: In float32.
    increasing: Whether the smallest stride comes first.
  """
  stacks, stages, half = twiddle.shape[:3]
  if not increasing:
    twiddle = twiddle[:, ::-1]
  small, large = jnp.moveaxis(twiddle, 0, 1), twiddle[:, SMALL:]
  # Twiddles of a block stand together, those of large strides by their place.
  small = small[:SMALL].reshape(SMALL, -1, WIDE // 2, 2, 2)
  shape = stacks, stages - SMALL, half // WIDE, WIDE, 2, 2
  large = large.reshape(shape).transpose(1, 0, 3, 2, 4, 5)
  dlarge = entry_gradients(
    dmatrix.transpose(0, 3, 1, 2).reshape(-1, *dmatrix.shape[1:3]),
    large.reshape(shape[1], stacks * WIDE, half // WIDE, 2, 2),
    increasing,
  )
  dlarge = dlarge.reshape(large.shape).transpose(1, 0, 3, 2, 4, 5)
  dsmall = entry_gradients(dblocks, small, increasing)
  dsmall = jnp.moveaxis(dsmall.reshape(SMALL, stacks, half, 2, 2), 0, 1)
  dlarge = dlarge.reshape(stacks, stages - SMALL, half, 2, 2)
  found = jnp.concatenate([dsmall, dlarge], axis=1)
  return found if increasing else found[:, ::-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def butterfly(x, twiddle, width, increasing, interpret):
  """Multiplies rows by a stack of butterflies.

  Args:
    x: (M, n) or (M, S n) bfloat16, M a multiple of 8.
    twiddle: (S, log2 n, n / 2, 2, 2).
    width: Of each stack's channels the first that are wanted.
    increasing: Whether the smallest stride comes first.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (M, S F) bfloat16, F of at least `width` channels.
  """
  return _run(x, twiddle, width, increasing, interpret, False)


def _run(x, twiddle, width, increasing, interpret, keep):
  n = 2 * twiddle.shape[2]
  config, share = CONFIGS[n], None
  if width < n:
    # Thread blocks write whole pieces, so the width is rounded up to these.
    each = n // config.cluster if config.cluster > 1 else config.each * WIDE
    share = -(-width // each) * each
  blocks, mixes = jax.vmap(lambda t: factors(t, increasing))(
    twiddle.astype(jnp.float32)
  )
  return _product(x, blocks, mixes, increasing, keep, share, interpret)


def _product(x, blocks, mixes, increasing, keep, width, interpret):
  """Runs the kernel that is made for as many channels."""
  n, blocks = blocks.shape[1] * WIDE, blocks.astype(x.dtype)
  options = dict(increasing=increasing, keep=keep, interpret=interpret)
  if n == resident.CHANNELS and width is None:
    return resident.product(x, blocks, mixes, **options)
  config = CONFIGS[n] if increasing else DECREASING.get(n, CONFIGS[n])
  return products.product(
    x, blocks, mixes, width=width, config=config, **options
  )


def _fwd(x, twiddle, width, increasing, interpret):
  y, middle = _run(x, twiddle, width, increasing, interpret, True)
  return y, (x, middle, twiddle)


def _bwd(width, increasing, interpret, kept, dy):
  del width
  x, middle, twiddle = kept
  stacks, _, half = twiddle.shape[:3]
  n = 2 * half
  if dy.shape[1] < stacks * n:
    dy = jnp.pad(dy, ((0, 0), (0, n - dy.shape[1])))
  exact = twiddle.astype(jnp.float32)
  blocks, mixes = jax.vmap(lambda t: factors(t, increasing))(exact)
  # The transposed butterfly has its stages in the opposite order.
  dx, dmiddle = _product(
    dy,
    blocks.transpose(0, 1, 3, 2),
    mixes[:, ::-1].transpose(0, 1, 2, 4, 3, 5),
    not increasing,
    True,
    None,
    interpret,
  )
  sides = [(dmiddle, x), (dy, middle)]
  of_blocks, of_mixes = sides if increasing else sides[::-1]
  dblocks = gradients.of_blocks(
    *of_blocks, config=gradients.blocks_config(n), interpret=interpret
  )
  if n < gradients.WIDE_MIXES:
    dmatrix = gradients.of_mixes(
      *of_mixes,
      stacks=stacks,
      config=gradients.mixes_config(n),
      interpret=interpret,
    )
  else:
    dmatrix = gradients.of_wide_mixes(*of_mixes, stacks=stacks)
  dtwiddle = _twiddle_gradient(dblocks, dmatrix, exact, increasing)
  if x.shape[1] < dx.shape[1]:
    dx = dx.reshape(-1, stacks, n).astype(jnp.float32).sum(axis=1)
  return dx.astype(x.dtype), dtwiddle.astype(twiddle.dtype)


butterfly.defvjp(_fwd, _bwd)
