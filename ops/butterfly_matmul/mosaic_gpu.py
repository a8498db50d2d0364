"""The Mosaic GPU `butterfly_matmul` for Hopper: forward, backward, binding.

No GPU has run these kernels yet: they are interpreted on a CPU and compiled for
Hopper. So `butterfly_matmul` takes them only where they are named.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.butterfly_matmul import mosaic_gpu_gradients as gradients
from ops.butterfly_matmul import mosaic_gpu_product as products
from ops.butterfly_matmul import xla
from ops.butterfly_matmul.mosaic_gpu_product import WIDE

# Stages that blocks of 64 channels merge.
SMALL = 6
# Rows are padded to a multiple of it, because TMA takes them by eights.
_ROWS = 8
# How products of n channels are launched, by n.
CONFIGS = {
  128: products.Config(rows=32, each=1),
  256: products.Config(rows=32),
  512: products.Config(rows=32),
  1024: products.Config(),
  2048: products.Config(rows=32, cluster=4, each=1),
  4096: products.Config(rows=32, cluster=8, each=1),
}


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
  blocks = xla.group_matrix(twiddle[None], (0, SMALL), increasing)[0, :, 0]
  large = twiddle[SMALL:] if increasing else twiddle[: stages - SMALL]
  mixes = large.reshape(-1, half // WIDE, WIDE, 2, 2)
  return blocks, mixes.transpose(0, 1, 3, 4, 2)


def mixing(mixes, increasing):
  """The matrices (H, H, 64) of mixes, of (out, in, place)."""
  depth, half = mixes.shape[:2]
  stages = range(depth) if increasing else range(depth)[::-1]
  eye = jnp.eye(2 * half)[:, :, None]
  y = jnp.broadcast_to(eye, (2 * half, 2 * half, WIDE))
  for at, bit in enumerate(stages):
    stride = 2**bit
    pairs = y.reshape(half // stride, 2, stride, 2 * half, WIDE)
    own = mixes[at].reshape(half // stride, stride, 2, 2, 1, WIDE)
    first, second = pairs[:, 0], pairs[:, 1]
    sums = [
      own[:, :, i, 0] * first + own[:, :, i, 1] * second for i in range(2)
    ]
    y = jnp.stack(sums, axis=1).reshape(2 * half, 2 * half, WIDE)
  return y


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
  return products.product(
    x,
    blocks.astype(x.dtype),
    mixes,
    increasing=increasing,
    keep=keep,
    width=share,
    config=config,
    interpret=interpret,
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
  of_all = lambda t: jax.vmap(lambda t: factors(t, increasing))(t)
  (blocks, mixes), back = jax.vjp(of_all, twiddle.astype(jnp.float32))
  # The transposed butterfly has its stages in the opposite order.
  dx, dmiddle = products.product(
    dy,
    blocks.transpose(0, 1, 3, 2).astype(x.dtype),
    mixes[:, ::-1].transpose(0, 1, 2, 4, 3, 5),
    increasing=not increasing,
    keep=True,
    config=CONFIGS[n],
    interpret=interpret,
  )
  sides = [(dmiddle, x), (dy, middle)]
  of_blocks, of_mixes = sides if increasing else sides[::-1]
  dblocks = gradients.of_blocks(
    *of_blocks, config=gradients.blocks_config(n), interpret=interpret
  )
  dmatrix = gradients.of_mixes(
    *of_mixes,
    stacks=stacks,
    config=gradients.mixes_config(n),
    interpret=interpret,
  )
  of_matrix = jax.vmap(lambda m: mixing(m, increasing))
  _, of_matrix = jax.vjp(of_matrix, mixes)
  (dmixes,) = of_matrix(dmatrix)
  (dtwiddle,) = back((dblocks.reshape(blocks.shape), dmixes))
  if x.shape[1] < dx.shape[1]:
    dx = dx.reshape(-1, stacks, n).astype(jnp.float32).sum(axis=1)
  return dx.astype(x.dtype), dtwiddle.astype(twiddle.dtype)


butterfly.defvjp(_fwd, _bwd)
