"""What the Mosaic GPU kernels of `ssd` share: chunks, tiles, products.

Hopper's matrix unit (wgmma) multiplies tiles of 64 rows, so a chunk is 64
tokens and a head is 64 channels; wider heads are taken as several of 64. One
warpgroup of 128 threads is one Pallas thread.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from ops.hopper_warpgroups import COLUMN as COLUMN
from ops.hopper_warpgroups import ROW as ROW
from ops.hopper_warpgroups import TILE as TILE
from ops.hopper_warpgroups import columns as columns
from ops.hopper_warpgroups import produce as produce
from ops.hopper_warpgroups import products as products
from ops.hopper_warpgroups import rows as rows
from ops.hopper_warpgroups import set_registers as set_registers
from ops.hopper_warpgroups import struct as struct
from ops.hopper_warpgroups import tile as tile
from ops.hopper_warpgroups import vector as vector

CHUNK = 64
CHANNELS = 64
STATE_SIZES = (64, 128)


def token_ids() -> tuple[jax.Array, jax.Array]:
  """The row and the column of each element of a (CHUNK, CHUNK) tile."""
  shape = (CHUNK, CHUNK)
  iota = lambda axis: plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=TILE
  )
  return iota(0), iota(1)


def load_tile(ref) -> jax.Array:
  """A bfloat16 tile of shared memory in float32."""
  return plgpu.load(ref, layout=TILE).astype(jnp.float32)


def masked_exp2(mask: jax.Array, exponent: jax.Array) -> jax.Array:
  """exp2(exponent) where mask, else 0: a masked exponent may be large."""
  return jnp.exp2(jnp.where(mask, exponent, -jnp.inf))
