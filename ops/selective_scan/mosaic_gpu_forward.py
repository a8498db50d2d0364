"""The forward GPU kernel of the selective scan."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ops.selective_scan import mosaic_gpu_tile as tiles

NAME = "selective_scan_fwd"


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
  """How the forward kernel is cut.

  Attributes:
    channels: Channels a block, 32 or 64. More need fewer loads a channel; fewer
      give more blocks to fill the chip with.
    tile: Tokens a tile, a multiple of 16 and of `unroll`.
    unroll: Tokens an iteration of the innermost loop.
    stages: Tiles of inputs in shared memory; all but one are being fetched.
    polynomial: Of every `unroll` tokens, those whose exponentials come from a
      polynomial on the float units, which frees the special function units.
  """

  channels: int = 32
  tile: int = 32
  unroll: int = 8
  stages: int = 2
  polynomial: int = 0


def forward(
  operands: dict[str, jax.Array],
  *,
  config: ForwardConfig,
  dt_softplus: bool,
  save_every: int | None,
) -> list[jax.Array]:
  """Runs the kernel.

  A block takes a few channels of one row of the batch. For every tile of tokens
  dt, dt x, B and C become float32 in shared memory, the recurrence runs token
  by token with the states in registers, skip and gate are applied, and y leaves
  by TMA. Meanwhile TMA fetches the next tiles.

  Args:
    operands: x, dt, B and C as in `api.selective_scan`, A * log2(e) in float32,
      and optionally z, and in float32 D, dt_bias, state (B, D, N) and marks
      (B, 2, L), what is added to a token's exponents and 0 for padding, else 1.
      L is a multiple of `config.tile`.
    config: How to cut the problem.
    dt_softplus: Whether softplus follows dt_bias.
    save_every: Tokens between two saved states, a multiple of `config.unroll`,
      or None to save none.

  Returns:
    y (B, L, D) in x's dtype, the final state (B, D, N) and, unless `save_every`
    is None, the states in front of every `save_every` tokens,
    (B, L / save_every, D, N), in float32.
  """
  x, B = operands["x"], operands["B"]
  batch, length, channels = x.shape
  groups, size = B.shape[2:]
  block = tiles.Block(size, config.channels, config.tile)
  num_tiles, per_group = length // config.tile, channels // groups
  names = tuple(operands)
  operands = {
    name: tiles.split(array) if name in ("A", "state") else array
    for name, array in operands.items()
  }
  streamed = [name for name in ("x", "dt", "z") if name in operands]

  def body(*refs, raw, ready, dt_, u_, B_, C_, y_, out_):
    given = dict(zip(names, refs[: len(names)], strict=True))
    y, final, *saved = refs[len(names) :]
    row = lax.axis_index("batch")
    first = lax.axis_index("blocks") * block.channels
    own = pl.ds(first, block.channels)
    slabs = block.slabs_from(first)

    fetch = functools.partial(
      block.fetch, given, raw, ready, row, first, first // per_group
    )

    def enter(slot):
      """Prepares dt, u = dt x, B and C of a tile in shared memory."""
      dt = block.load_tokens(raw["dt"].at[slot])
      if "dt_bias" in given:
        dt = dt + constants["dt_bias"]
      if dt_softplus:
        dt = tiles.softplus(dt)
      if "marks" in given:
        dt = dt * block.over_channels(raw["marks"].at[slot, 1])
      dt_[...] = dt
      u_[...] = dt * block.load_tokens(raw["x"].at[slot])
      block.widen(raw["B"].at[slot], B_)
      block.widen(raw["C"].at[slot], C_)

    def step(states, token, slot, polynomial):
      """Returns the states after a token and the parts of y, for all slabs."""
      B_t, C_t = block.over_rows(B_.at[token]), block.over_rows(C_.at[token])
      following = []
      for i, h in enumerate(states):
        slab = block.slab(i)
        exponent = block.over_states(dt_.at[token, slab]) * decays[i]
        if "marks" in given:
          exponent = exponent + raw["marks"][slot, 0, token]
        decay = tiles.exp2(exponent, polynomial)
        following.append(
          decay * h + block.over_states(u_.at[token, slab]) * B_t
        )
      return tuple(following), [jnp.sum(h * C_t, axis=2) for h in following]

    def leave(slot):
      """Applies skip and gate to a tile."""
      value = block.load_sums(y_)
      if "D" in given:
        x = block.load_tokens(raw["x"].at[slot])
        value = value + constants["D"] * x
      if "z" in given:
        z = block.load_tokens(raw["z"].at[slot])
        value = value * z * tiles.sigmoid(z)
      out_[...] = value.astype(out_.dtype)

    def save(position, states):
      @pl.when(lax.rem(position, save_every) == 0)
      def _():
        for slab, h in zip(slabs, states, strict=True):
          saved[0][row, position // save_every, slab] = h

    def one_tile(index, states):
      slot = lax.rem(index, config.stages)
      plgpu.barrier_wait(ready.at[slot])
      enter(slot)
      tiles.meet()

      def some_tokens(group, states):
        if saved:
          save(index * block.tile + group * config.unroll, states)
        # A load cannot go ahead of a store, so these come after all loads.
        first_token, parts = group * config.unroll, []
        for k in range(config.unroll):
          polynomial = _spread(k, config.polynomial, config.unroll)
          states, of_slabs = step(states, first_token + k, slot, polynomial)
          parts += [(first_token + k, *pair) for pair in enumerate(of_slabs)]
        for token, i, part in parts:
          block.store_parts(y_, token, i, part)
        return states

      groups_of_tile = block.tile // config.unroll
      states = lax.fori_loop(0, groups_of_tile, some_tokens, states)
      # All threads wait until y_ is complete and out_ has left.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      leave(slot)
      plgpu.commit_smem()
      tokens = pl.ds(index * block.tile, block.tile)
      plgpu.copy_smem_to_gmem(out_, y.at[row, tokens, own])

      @pl.when(index + config.stages < num_tiles)
      def _():
        fetch(index + config.stages, slot)

      return states

    for slot in range(min(config.stages, num_tiles)):
      fetch(slot, slot)
    constants = {
      name: block.over_tokens(given[name].at[own], block.tile)
      for name in ("D", "dt_bias")
      if name in given
    }
    decays = [tiles.load(given["A"].at[s], block.states) for s in slabs]
    if "state" in given:
      state = given["state"]
      states = [tiles.load(state.at[row, s], block.states) for s in slabs]
    else:
      zeros = jnp.zeros((block.rows, block.quads, 4), jnp.float32)
      states = [plgpu.layout_cast(zeros, block.states)] * block.slabs
    states = lax.fori_loop(0, num_tiles, one_tile, tuple(states))
    for slab, h in zip(slabs, states, strict=True):
      final[row, slab] = h
    plgpu.wait_smem_to_gmem(0)

  shared, wide = tiles.shared, (block.tile, block.channels)
  out_type = [
    jax.ShapeDtypeStruct(x.shape, x.dtype),
    jax.ShapeDtypeStruct((batch, channels, block.quads, 4), jnp.float32),
  ]
  if save_every is not None:
    shape = (batch, length // save_every, channels, block.quads, 4)
    out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  kernel = plgpu.kernel(
    body,
    out_type=out_type,
    grid=(channels // block.channels, batch),
    grid_names=("blocks", "batch"),
    scratch_types={
      **block.stream(operands, streamed, config.stages),
      "dt_": shared(*wide),
      "u_": shared(*wide),
      "B_": shared(block.tile, block.quads, 4),
      "C_": shared(block.tile, block.quads, 4),
      "y_": shared(*block.parts_shape(block.tile)),
      "out_": shared(*wide, dtype=x.dtype),
    },
    compiler_params=tiles.compiler_params(),
    kernel_name=NAME,
  )
  y, *states = kernel(*operands.values())
  return [y, *(s.reshape(*s.shape[:-2], size) for s in states)]


def _spread(index, count, total):
  """Whether `index` is one of `count` evenly spread ones of `total`."""
  return (index + 1) * count // total > index * count // total
