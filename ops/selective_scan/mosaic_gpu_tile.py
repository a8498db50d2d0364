"""What the forward and backward GPU kernels of the selective scan share.

One warpgroup, 128 threads, holds a few slabs of `rows` channels and walks
through the tokens of one row of the batch. A slab's state is (rows, N / 4, 4)
float32, the last axis in one thread. Arrays of tokens are (tokens, channels),
up to four neighbouring channels a thread, and pass between the two layouts
through shared memory. There sums over states lie as N / 4 parts, since adding
these up token by token would take two shuffles each.
"""

import dataclasses
import functools
import operator

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Added to the exponent of a decay in front of which the state is reset.
RESET_EXPONENT = -1e30

# Least relative error of 2^f on [-0.5, 0.5] (2e-7) and of log1p(u) / u on
# [0, 1] (2e-7), float32 coefficients from the highest power down.
_EXP2 = (
  0.001327647129073739,
  0.009675540961325169,
  0.05550713092088699,
  0.24022120237350464,
  0.6931469440460205,
  1.0000001192092896,
)
_LOG1P = (
  0.005232691299170256,
  -0.029505226761102676,
  0.07822593301534653,
  -0.13663244247436523,
  0.19106006622314453,
  -0.2484298199415207,
  0.3331909775733948,
  -0.4999949336051941,
  0.9999999403953552,
)


# What is fetched tile by tile, where it is given.
_STREAMED = ("x", "dt", "dy", "z", "B", "C", "marks")


@dataclasses.dataclass(frozen=True)
class Block:
  """Sizes and register layouts of the part of a problem one block holds.

  Attributes:
    size: States a channel, N.
    channels: Channels of the block, 32 or 64, a multiple of `rows`.
    tile: Tokens that lie in shared memory at a time.
  """

  size: int
  channels: int
  tile: int

  @property
  def rows(self) -> int:
    """Channels of a slab: with four states each, 128 threads hold it."""
    return slab_rows(self.size)

  @property
  def slabs(self) -> int:
    """Slabs of the block."""
    return self.channels // self.rows

  @property
  def quads(self) -> int:
    """Threads a channel, each with four of its states."""
    return self.size // 4

  @property
  def states(self) -> plgpu.Layout:
    """The layout of a slab's states, (rows, N / 4, 4)."""
    whole = (self.rows, self.quads, 4)
    tiling = plgpu.Tiling((whole, (self.rows // 4, self.quads, 4)))
    return plgpu.Layout.TILED(tiling, (-6,), (-3, -2), -1)

  def slab(self, index: int) -> pl.Slice:
    """The channels of a slab inside of the block."""
    return pl.ds(index * self.rows, self.rows)

  def slabs_from(self, first) -> list[pl.Slice]:
    """The channels of all slabs, of a block that begins at channel `first`."""
    return [pl.ds(first + i * self.rows, self.rows) for i in range(self.slabs)]

  def stream(self, operands, streamed, stages: int) -> dict:
    """Shared memory of the tiles that `fetch` brings, and their barriers.

    Args:
      operands: The kernel's operands by name.
      streamed: Names of those that are (B, L, D).
      stages: Tiles in shared memory.
    """
    shapes = dict.fromkeys(streamed, (self.tile, self.channels))
    shapes |= dict.fromkeys(("B", "C"), (self.tile, self.size))
    if "marks" in operands:
      shapes["marks"] = (2, self.tile)
    return {
      "raw": {
        name: shared(stages, *shape, dtype=operands[name].dtype)
        for name, shape in shapes.items()
      },
      "ready": plgpu.Barrier(num_arrivals=len(shapes), num_barriers=stages),
    }

  def fetch(self, given, raw, ready, row, first, group, index, slot):
    """Starts to copy tile `index` to shared memory; one warp does that.

    Args:
      given: The operands in global memory by name.
      raw: Of `stream`, as `ready`.
      ready: What is told when they have come.
      row: Row of the batch.
      first: First channel of the block.
      group: Of B and C.
      index: Of the tile.
      slot: Stage that it goes to.
    """
    tokens = pl.ds(index * self.tile, self.tile)
    place = {"B": (row, tokens, group), "C": (row, tokens, group)}
    place["marks"] = row, slice(None), tokens
    own = row, tokens, pl.ds(first, self.channels)
    copies = [
      (given[name].at[place.get(name, own)], raw[name].at[slot])
      for name in _STREAMED
      if name in raw
    ]

    @plgpu.warp_map
    def _(warp):
      @pl.when(warp == 0)
      def _():
        for source, target in copies:
          plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

  def over_states(self, ref) -> jax.Array:
    """Loads a slab's values, (rows,), and repeats them over the states."""
    values = load(ref, self.states.reduce((1, 2)))
    return _repeat(values, (0,), (self.rows, self.quads, 4), self.states)

  def over_rows(self, ref) -> jax.Array:
    """Loads a token's B or C, (N / 4, 4), and repeats it over a slab."""
    values = load(ref, self.states.reduce(0))
    return _repeat(values, (1, 2), (self.rows, self.quads, 4), self.states)

  def tokens(self, count: int) -> plgpu.Layout:
    """The layout of arrays of so many tokens, (count, channels)."""
    vector = min(4, count * self.channels // 128)
    rows = 32 * vector // self.channels
    whole, part = (4 * rows, self.channels), (rows, self.channels)
    if rows == 1:
      tiling = plgpu.Tiling((whole, (vector,)))
      return plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)
    tiling = plgpu.Tiling((whole, part, (vector,)))
    return plgpu.Layout.TILED(tiling, (-5,), (-3, -2), -1)

  def load_tokens(self, ref) -> jax.Array:
    """Loads (tokens, channels) as float32."""
    return load(ref, self.tokens(ref.shape[0])).astype(jnp.float32)

  def over_tokens(self, ref, count: int) -> jax.Array:
    """Loads the channels' values, (channels,), and repeats them."""
    layout = self.tokens(count)
    values = load(ref, layout.reduce(0))
    return _repeat(values, (1,), (count, self.channels), layout)

  def over_channels(self, ref) -> jax.Array:
    """Loads the tokens' values, (tokens,), and repeats them over channels."""
    layout = self.tokens(ref.shape[0])
    values = load(ref, layout.reduce(1))
    return _repeat(values, (0,), (*ref.shape, self.channels), layout)

  def parts_shape(self, tokens: int) -> tuple[int, ...]:
    """The shape of the parts of (tokens, channels) sums over states.

    A warp stores to all N / 4 of them at once, so these lie in other banks.
    """
    return tokens, self.quads, self.channels + 32 // self.quads

  def store_parts(self, ref, token, index: int, parts: jax.Array):
    """Stores the parts, (rows, N / 4), of a token's sums over a slab."""
    ref.at[token, :, self.slab(index)].T[...] = parts

  def load_sums(self, ref) -> jax.Array:
    """Adds up the parts of sums, (tokens, channels)."""
    own = pl.ds(0, self.channels)
    parts = [self.load_tokens(ref.at[:, i, own]) for i in range(self.quads)]
    return functools.reduce(operator.add, parts)

  def widen(self, source, target):
    """Copies the tile's B or C, (tile, N), to float32 (tile, N / 4, 4)."""
    vector = min(4, self.tile * self.size // 128)
    shape = (self.tile, self.size)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vector)
    values = load(source, layout).astype(jnp.float32)
    target[...] = values.reshape(self.tile, self.quads, 4)


def slab_rows(size: int) -> int:
  """Returns how many channels of N states 128 threads of four states hold."""
  return 512 // size


def split(array: jax.Array) -> jax.Array:
  """Returns (..., N) as (..., N / 4, 4)."""
  return array.reshape(*array.shape[:-1], -1, 4)


def load(ref, layout) -> jax.Array:
  """Loads a reference into registers of a layout."""
  return plgpu.load(ref, layout=layout, optimized=False)


def shared(*shape: int, dtype=jnp.float32) -> plgpu.SMEM:
  """Shared memory."""
  return plgpu.SMEM(shape, dtype)


def meet():
  """Lets all threads wait for each other, and see what they have stored.

  Copies to global memory, which this also counts, may go on.
  """
  plgpu.wait_smem_to_gmem(16, wait_read_only=True)


def _repeat(values, axes, shape, layout):
  return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, axes), layout)


def compiler_params() -> plgpu.CompilerParams:
  """Returns what both kernels are compiled with."""
  # Every layout is given, and the search of the warpgroup semantics for layouts
  # takes minutes where tokens are unrolled.
  return plgpu.CompilerParams(
    approx_math=True,
    unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
  )


def exp2(x: jax.Array, polynomial: bool = False) -> jax.Array:
  """2^x for x <= 0.

  The special function units take eight cycles for a warp's 32 values. As a
  `polynomial` it takes about ten instructions of the eight times wider float
  units (as in FlashAttention-4), and what is below 2^-126 comes out as that.
  """
  if not polynomial:
    return jnp.exp2(x)
  x = jnp.maximum(x, -126.0)
  # Adding 1.5 * 2^23 leaves the rounded x in the lowest bits, as long as no
  # compiler takes the sum and the difference for nothing.
  shifted = lax.optimization_barrier(x + 12582912.0)
  fraction = x - (shifted - 12582912.0)
  bits = lax.bitcast_convert_type(_horner(_EXP2, fraction), jnp.int32)
  exponent = lax.bitcast_convert_type(shifted, jnp.int32) << 23
  return lax.bitcast_convert_type(bits + exponent, jnp.float32)


def softplus(v: jax.Array) -> jax.Array:
  """log(1 + exp(v)), as accurate where it is tiny."""
  u = jnp.exp2(jnp.abs(v) * -LOG2E)
  return jnp.maximum(v, 0.0) + u * _horner(_LOG1P, u)


def sigmoid(v: jax.Array) -> jax.Array:
  """1 / (1 + exp(-v))."""
  return 1.0 / (1.0 + jnp.exp2(v * -LOG2E))


def _horner(coefficients, x):
  value = jnp.full_like(x, coefficients[0])
  for coefficient in coefficients[1:]:
    value = value * x + coefficient
  return value
