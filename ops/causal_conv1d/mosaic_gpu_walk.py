"""What the GPU kernels of the causal convolution share: a walk over tokens.

One warpgroup, 128 threads, walks through some tokens of one row of the batch. A
thread holds a few neighbouring channels, so that an input is read once and
stays in registers for the tokens that see it. Only the weights pass through
shared memory. Several blocks a multiprocessor, each of which loads the next few
tokens while it works on these, keep the memory busy.
"""

import dataclasses
import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

_THREADS = 128
_LOG2E = 1.4426950408889634
# Factors of the preactivations that SiLU takes, by the way it is computed. Taps
# and bias are multiplied by them once, which saves a product a value.
GATES = {"root": 1.0, "tanh": 0.5}


@dataclasses.dataclass(frozen=True)
class Walk:
  """How a kernel is cut.

  Attributes:
    vector: Neighbouring channels of a thread, 2 or 4.
    rows: Tokens that are loaded at once, at least K-1.
    tokens: Tokens of a block, a multiple of `rows` and at most L.
    gate: How SiLU is computed, a key of `GATES`.
    ring: Steps that the forward kernel's inputs are fetched ahead, by bulk
      copies into shared memory; 0 fetches one step into registers. It takes a
      vector of 2, because a copy takes up to 256 channels.
  """

  vector: int
  rows: int
  tokens: int
  gate: str = "root"
  ring: int = 0

  @property
  def channels(self) -> int:
    """Channels of a block."""
    return _THREADS * self.vector

  @property
  def steps(self) -> int:
    """How often a block loads tokens."""
    return self.tokens // self.rows

  @property
  def layout(self) -> plgpu.Layout:
    """The layout of a token's values, (channels,)."""
    warp = self.channels // 4
    tiling = plgpu.Tiling(((self.channels,), (warp,), (self.vector,)))
    return plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)

  def segments(self, length: int) -> int:
    """Blocks along a row of `length` tokens."""
    return pl.cdiv(length, self.tokens)

  def kernel(
    self, body, x: jax.Array, taps: int, name: str, scratch=(), **options
  ):
    """Makes a kernel with a block for all tokens and channels of x.

    Args:
      body: Takes the references and by name what is in shared memory: `taps_`,
        for the weights, and `scratch`.
      x: (B, L, D).
      taps: K.
      name: Of the kernel.
      scratch: What else is in shared memory, by name.
      **options: Of `plgpu.kernel`.
    """
    batch, length, channels = x.shape
    blocks = pl.cdiv(channels, self.channels)
    return plgpu.kernel(
      body,
      grid=(self.segments(length), batch, blocks),
      grid_names=("segment", "row", "block"),
      scratch_types={
        "taps_": plgpu.SMEM((taps, self.channels), jnp.float32),
        **dict(scratch),
      },
      # Every layout is given, and `load_taps` has the only barrier.
      compiler_params=plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
      ),
      kernel_name=name,
      **options,
    )

  def place(self, x: jax.Array):
    """Returns this block's row of the batch, first token and channels.

    The last blocks begin earlier where they would not be whole, and write some
    results for a second time.
    """
    _, length, channels = x.shape
    first = lax.axis_index("segment") * self.tokens
    channel = lax.axis_index("block") * self.channels
    first = jnp.minimum(first, length - self.tokens)
    channel = jnp.minimum(channel, channels - self.channels)
    return lax.axis_index("row"), first, pl.ds(channel, self.channels)

  def load(self, ref) -> jax.Array:
    """Loads values of the block's channels."""
    return plgpu.load(ref, layout=self.layout, optimized=False)

  def load_rows(self, ref, first) -> list[jax.Array]:
    """Loads `rows` tokens of (L, channels); one address serves for all."""
    near = ref.at[pl.ds(first, self.rows)]
    return [self.load(near.at[k]) for k in range(self.rows)]

  def load_before(self, x, state, first, taps: int) -> list[jax.Array]:
    """Loads the K-1 inputs in front of token `first`, float32, newest first.

    Args:
      x: (L, channels).
      state: What comes in front of it, (K-1, channels), or None for zeros.
      first: The token.
      taps: K.
    """
    found = []
    for token in (first - back for back in range(1, taps)):
      values = self.load(x.at[jnp.maximum(token, 0)])
      older = jnp.zeros_like(values)
      if state is not None:
        # Where no state is needed this reads any of it.
        older = self.load(state.at[jnp.minimum(token + taps - 1, taps - 2)])
      found.append(jnp.where(token < 0, older, values).astype(jnp.float32))
    return found

  def scale(self, silu: bool) -> float:
    """What taps and bias are multiplied by."""
    return GATES[self.gate] if silu else 1.0

  def load_weights(self, given, own, taps_, silu: bool):
    """Loads the bias, if there is one, and the taps, in float32 and scaled.

    Args:
      given: References by name.
      own: Channels of the block.
      taps_: As of `load_taps`.
      silu: Whether SiLU follows.
    """
    bias, scale = None, self.scale(silu)
    if "bias" in given:
      bias = self.load(given["bias"].at[own]).astype(jnp.float32)
    taps = self.load_taps(given["weight"].at[own], taps_)
    if scale == 1.0:
      return bias, taps
    return None if bias is None else bias * scale, [tap * scale for tap in taps]

  def load_taps(self, weight, taps_) -> list[jax.Array]:
    """Loads (channels, K), and returns the taps by how far they look back.

    Args:
      weight: In global memory.
      taps_: Shared memory, (K, channels), to turn it around.
    """
    taps, channels = taps_.shape
    wide = (channels, taps)
    tiling = plgpu.Tiling((wide, (channels // 4, taps), (32, 1)))
    layout = plgpu.Layout.TILED(tiling, (-6,), (-2,), -1)
    values = plgpu.load(weight, layout=layout, optimized=False)
    values = values.astype(jnp.float32)
    numbers = plgpu.broadcasted_iota(jnp.int32, wide, 1, layout=layout)
    for k in range(taps):
      # A sum inside of a thread, of which the compiler leaves the one value.
      taps_[k] = jnp.sum(jnp.where(numbers == k, values, 0.0), axis=1)
    plgpu.commit_smem()
    return [self.load(taps_.at[k]) for k in reversed(range(taps))]

  def zeros(self) -> jax.Array:
    """Sums to begin with."""
    zeros = jnp.zeros((self.channels,), jnp.float32)
    return plgpu.layout_cast(zeros, self.layout)


def meet(interpret: bool) -> None:
  """Lets the warps of a block wait for each other."""
  if interpret:
    plgpu.commit_smem()
    return

  @plgpu.inline_mgpu()
  def barrier(_):
    mgpu.utils.warpgroup_barrier()

  barrier()


def seen(values: jax.Array, reach, back: int) -> jax.Array:
  """Zeros where a token does not see `back` taps back; None sees all."""
  return values if reach is None else jnp.where(reach >= back, values, 0.0)


def preactivation(inputs, taps, bias, reach) -> jax.Array:
  """Adds up a token's taps; `inputs` has its own input and those before."""
  terms = [
    seen(values, reach if back else None, back) * tap
    for back, (values, tap) in enumerate(zip(inputs, taps, strict=True))
  ]
  if bias is not None:
    terms.insert(0, bias)
  return functools.reduce(jnp.add, terms)


def silu(pre: jax.Array, gate: str) -> jax.Array:
  """SiLU of preactivations, which are multiplied by `GATES[gate]`."""
  if gate == "tanh":
    return pre + pre * jnp.tanh(pre)
  return pre * sigmoid(pre)


def slope(pre: jax.Array, dy: jax.Array, gate: str) -> jax.Array:
  """SiLU's gradient divided by `GATES[gate]`, of such preactivations."""
  if gate == "tanh":
    found = jnp.tanh(pre)
    twice, rest = dy + dy * found, pre - pre * found
    return twice + twice * rest
  found = sigmoid(pre)
  return dy * (found * (1.0 + pre * (1.0 - found)))


def sigmoid(v: jax.Array) -> jax.Array:
  """1 / (1 + exp(-v)), as a square: a division takes five instructions more."""
  root = lax.rsqrt(1.0 + jnp.exp2(v * -_LOG2E))
  return root * root
