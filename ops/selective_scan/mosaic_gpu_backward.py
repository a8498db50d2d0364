"""The backward GPU kernel of the selective scan."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ops.selective_scan import mosaic_gpu_tile as tiles

NAME = "selective_scan_bwd"


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
  """How the backward kernel is cut.

  Attributes:
    channels: Channels a block, 32 or 64.
    tile: Tokens a tile, a multiple of 16 and of `unroll`. The forward kernel
      saves the states in front of every tile.
    unroll: Tokens whose states and decays are held in registers, a multiple
      of `flush`.
    flush: Tokens between two sums of dB and dC over the block's channels, 8 or
      4. It costs 4 KiB of shared memory a token.
    stages: Tiles of inputs in shared memory, at least 2; all but one are being
      fetched.
  """

  channels: int = 32
  tile: int = 16
  unroll: int = 8
  flush: int = 8
  stages: int = 2


def backward(
  operands: dict[str, jax.Array],
  *,
  config: BackwardConfig,
  dt_softplus: bool,
) -> dict[str, jax.Array]:
  """Runs the kernel.

  With a_t the decays, u = dt x, v_t the cotangent of C_t . h_t and g_t that of
  h_t, a block walks back through the tiles of its channels:

    g_t = C_t v_t + a_{t+1} g_{t+1}         p_t = a_t g_t h_{t-1}
    dC_t = sum_D v_t h_t                    dB_t = sum_D u_t g_t
    du_t = sum_N g_t B_t                    ddt_t = x_t du_t + sum_N p_t A
    dx_t = dt_t du_t + D v_t                dA = sum_t p_t dt_t

  From the saved state in front of a tile it first finds those in front of every
  `unroll` tokens, and from these, group after group, all states and decays of a
  group, in registers. For sums over the states of a channel and for sums over
  channels, all threads write their parts to shared memory, and each then adds
  up a few of them.

  Args:
    operands: As of `mosaic_gpu_forward.forward` without state, and dy (B, L, D)
      in x's dtype, dfinal (B, D, N) in float32 and the saved states.
    config: How to cut the problem.
    dt_softplus: Whether softplus follows dt_bias.

  Returns:
    dx, ddt and, with z, dz in the dtypes of x, dt and z. In float32: dA and
    dstate, (B, D, N), dB and dC, (blocks, B, L, N), and, with D and dt_bias,
    dD and ddt_bias, (B, D); all yet to be summed over rows or blocks.
  """
  x, B = operands["x"], operands["B"]
  batch, length, channels = x.shape
  groups, size = B.shape[2:]
  block = tiles.Block(size, config.channels, config.tile)
  num_tiles, per_group = length // config.tile, channels // groups
  num_blocks = channels // block.channels
  names = tuple(operands)
  operands = {
    name: tiles.split(a) if name in ("A", "dfinal", "states") else a
    for name, a in operands.items()
  }
  streamed = [n for n in ("x", "dt", "dy", "z") if n in operands]
  results = {"x": "dx", "dt": "ddt"} | ({"z": "dz"} if "z" in operands else {})
  sums = [n for n in ("D", "dt_bias") if n in operands]
  per_channel = jax.ShapeDtypeStruct(
    (batch, channels, block.quads, 4), jnp.float32
  )
  per_token = jax.ShapeDtypeStruct(
    (num_blocks, batch, 2, length, block.quads, 4), jnp.float32
  )
  out_type = {
    name: jax.ShapeDtypeStruct(x.shape, operands[source].dtype)
    for source, name in results.items()
  }
  out_type |= {"dA": per_channel, "dstate": per_channel, "dBC": per_token}
  for name in sums:
    out_type["d" + name] = jax.ShapeDtypeStruct((batch, channels), jnp.float32)

  def body(*refs, raw, ready, dt_, u_, v_, y_, du_, ddt_, B_, C_, h_, parts_):
    given = dict(zip(names, refs[: len(names)], strict=True))
    out = dict(zip(out_type, refs[len(names) :], strict=True))
    row, number = lax.axis_index("batch"), lax.axis_index("blocks")
    first = number * block.channels
    own = pl.ds(first, block.channels)
    slabs = block.slabs_from(first)
    decays = [tiles.load(given["A"].at[s], block.states) for s in slabs]

    load_constants = lambda tokens: {
      name: block.over_tokens(given[name].at[own], tokens) for name in sums
    }
    of_tile, of_group = (
      load_constants(block.tile),
      load_constants(config.unroll),
    )

    fetch = functools.partial(
      block.fetch, given, raw, ready, row, first, first // per_group
    )

    def enter(slot):
      """Prepares dt, u, v, B and C of a tile in shared memory."""
      dt = block.load_tokens(raw["dt"].at[slot])
      if "dt_bias" in given:
        dt = dt + of_tile["dt_bias"]
      if dt_softplus:
        dt = tiles.softplus(dt)
      if "marks" in given:
        dt = dt * block.over_channels(raw["marks"].at[slot, 1])
      dt_[...] = dt
      u_[...] = dt * block.load_tokens(raw["x"].at[slot])
      v = block.load_tokens(raw["dy"].at[slot])
      if "z" in given:
        z = block.load_tokens(raw["z"].at[slot])
        v = v * z * tiles.sigmoid(z)
      v_[...] = v
      block.widen(raw["B"].at[slot], B_)
      block.widen(raw["C"].at[slot], C_)

    def advance(h, i, token, slot):
      """Returns a token's decays of slab i and the states after it."""
      slab = block.slab(i)
      exponent = block.over_states(dt_.at[token, slab]) * decays[i]
      if "marks" in given:
        exponent = exponent + raw["marks"][slot, 0, token]
      decay = tiles.exp2(exponent)
      u = block.over_states(u_.at[token, slab])
      return decay, decay * h + u * block.over_rows(B_.at[token])

    def find_states(index, slot):
      """Leaves the states in front of every group of the tile in h_."""
      for i, slab in enumerate(slabs):
        states = given["states"].at[row, index, slab]
        h_[0, block.slab(i)] = tiles.load(states, block.states)

      def some_tokens(group, carry):
        for i in range(block.slabs):
          h = tiles.load(h_.at[group, block.slab(i)], block.states)
          for k in range(config.unroll):
            _, h = advance(h, i, group * config.unroll + k, slot)
          h_[group + 1, block.slab(i)] = h
        return carry

      lax.fori_loop(0, block.tile // config.unroll - 1, some_tokens, ())

    def recompute(group, slot):
      """Stores the parts of y, and returns [token][slab] of the group.

      Each is a tuple of the decays and the states in front of and after the
      token, which stay in registers.
      """
      kept, parts = [], []
      states = [
        tiles.load(h_.at[group, block.slab(i)], block.states)
        for i in range(block.slabs)
      ]
      for k in range(config.unroll):
        token = group * config.unroll + k
        found = [advance(h, i, token, slot) for i, h in enumerate(states)]
        kept.append([(a, h, after) for (a, after), h in zip(found, states)])
        states = [h for _, h in found]
        if "z" in given:
          C_t = block.over_rows(C_.at[token])
          parts += [
            (k, i, jnp.sum(h * C_t, axis=2)) for i, h in enumerate(states)
          ]
        if k == config.unroll // 2 - 1:
          # All have added up what was stored before.
          tiles.meet()
        if k % (config.unroll // 2) == config.unroll // 2 - 1:
          # Loads cannot go ahead of stores, so these come after half a group,
          # and after no more of it for want of registers.
          for part in parts:
            block.store_parts(y_, *part)
          parts = []
      return kept

    def load_token(token):
      """Returns a token's B, C and, for each slab, dt, u and v."""
      B_t, C_t = block.over_rows(B_.at[token]), block.over_rows(C_.at[token])
      load = lambda ref, i: block.over_states(ref.at[token, block.slab(i)])
      refs = (dt_, u_, v_)
      return B_t, C_t, [[load(r, i) for r in refs] for i in range(block.slabs)]

    def step_back(k, carry, kept, loaded):
      """Goes back by a token; the carry is (a_{t+1} g_{t+1}, dA) a slab."""
      B_t, C_t, of_slabs = loaded
      part_B, part_C, following = 0.0, 0.0, []
      for i, (ag, dA) in enumerate(carry):
        decay, before, after = kept[i]
        dt, u, v = of_slabs[i]
        g = C_t * v + ag
        part_C = part_C + v * after
        part_B = part_B + u * g
        block.store_parts(du_, k, i, jnp.sum(g * B_t, axis=2))
        ag = decay * g
        p = ag * before
        block.store_parts(ddt_, k, i, jnp.sum(p * decays[i], axis=2))
        following.append((ag, dA + p * dt))
      for i, part in enumerate((part_B, part_C)):
        parts_[i, k % config.flush] = part
      return following

    def flush(token):
      """Sums the parts of dB and dC of `flush` tokens over channels."""
      layout = _parts_layout(config.flush, block)
      totals = jnp.sum(tiles.load(parts_, layout), axis=2)
      out["dBC"][number, row, :, pl.ds(token, config.flush)] = totals

    def some_tokens_back(step, carry, index, slot):
      group = block.tile // config.unroll - 1 - step
      token = group * config.unroll
      carry, totals = carry
      kept = recompute(group, slot)
      # Loads cannot go ahead of stores, so they are one token ahead here.
      loaded = load_token(token + config.unroll - 1)
      for k in reversed(range(config.unroll)):
        if (k + 1) % config.flush == 0 and k + 1 < config.unroll:
          tiles.meet()
        following = load_token(token + k - 1) if k else None
        carry = step_back(k, carry, kept[k], loaded)
        loaded = following
        if k % config.flush == 0:
          tiles.meet()
          flush(index * block.tile + token + k)
      return carry, leave(token, slot, totals)

    def leave(token, slot, totals):
      """Turns a group's sums into dx, ddt and dz, in place of the inputs."""
      tokens = pl.ds(token, config.unroll)
      refs = {name: raw[name].at[slot, tokens] for name in streamed}
      x, v = block.load_tokens(refs["x"]), block.load_tokens(v_.at[tokens])
      du = block.load_sums(du_)
      ddt = block.load_sums(ddt_) * tiles.LN2 + du * x
      if "marks" in given:
        ddt = ddt * block.over_channels(raw["marks"].at[slot, 1, tokens])
      if dt_softplus:
        dt = block.load_tokens(refs["dt"])
        if "dt_bias" in given:
          dt = dt + of_group["dt_bias"]
        ddt = ddt * tiles.sigmoid(dt)
      dx = du * block.load_tokens(dt_.at[tokens])
      terms = {"D": v * x, "dt_bias": ddt}
      if "D" in given:
        dx = dx + v * of_group["D"]
      if "z" in given:
        y = block.load_sums(y_)
        if "D" in given:
          y = y + of_group["D"] * x
        z = block.load_tokens(refs["z"])
        gate = tiles.sigmoid(z)
        dy = block.load_tokens(refs["dy"])
        dz = dy * y * gate * (1.0 + z * (1.0 - gate))
        refs["z"][...] = dz.astype(raw["z"].dtype)
      refs["x"][...] = dx.astype(raw["x"].dtype)
      refs["dt"][...] = ddt.astype(raw["dt"].dtype)
      return [t + terms[n] for n, t in zip(sums, totals, strict=True)]

    def one_tile(step, carry):
      index = num_tiles - 1 - step
      slot = lax.rem(step, config.stages)
      plgpu.barrier_wait(ready.at[slot])
      enter(slot)
      tiles.meet()
      find_states(index, slot)
      # All threads wait until the last tile's gradients have left its slot.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      ahead = step + config.stages - 1

      @pl.when((step > 0) & (ahead < num_tiles))
      def _():
        fetch(num_tiles - 1 - ahead, lax.rem(ahead, config.stages))

      carry = lax.fori_loop(
        0,
        block.tile // config.unroll,
        lambda step, carry: some_tokens_back(step, carry, index, slot),
        carry,
      )
      plgpu.commit_smem()
      tokens = pl.ds(index * block.tile, block.tile)
      for source, name in results.items():
        target = out[name].at[row, tokens, own]
        plgpu.copy_smem_to_gmem(raw[source].at[slot], target)
      return carry

    for step in range(min(config.stages, num_tiles)):
      fetch(num_tiles - 1 - step, step)
    zeros = jnp.zeros((block.rows, block.quads, 4), jnp.float32)
    zeros = plgpu.layout_cast(zeros, block.states)
    carry = [
      (tiles.load(given["dfinal"].at[row, slab], block.states), zeros)
      for slab in slabs
    ]
    none = jnp.zeros((config.unroll, block.channels), jnp.float32)
    none = plgpu.layout_cast(none, block.tokens(config.unroll))
    totals = [none] * len(sums)
    carry, totals = lax.fori_loop(0, num_tiles, one_tile, (carry, totals))
    for slab, (ag, dA) in zip(slabs, carry, strict=True):
      out["dstate"][row, slab] = ag
      out["dA"][row, slab] = dA
    for name, total in zip(sums, totals, strict=True):
      out["d" + name][row, own] = jnp.sum(total, axis=0)
    plgpu.wait_smem_to_gmem(0)

  shared, wide = tiles.shared, (block.tile, block.channels)
  kernel = plgpu.kernel(
    body,
    out_type=list(out_type.values()),
    grid=(num_blocks, batch),
    grid_names=("blocks", "batch"),
    scratch_types={
      **block.stream(operands, streamed, config.stages),
      "dt_": shared(*wide),
      "u_": shared(*wide),
      "v_": shared(*wide),
      "y_": shared(*block.parts_shape(config.unroll)),
      "du_": shared(*block.parts_shape(config.unroll)),
      "ddt_": shared(*block.parts_shape(config.unroll)),
      "B_": shared(block.tile, block.quads, 4),
      "C_": shared(block.tile, block.quads, 4),
      "h_": shared(block.tile // config.unroll, block.channels, block.quads, 4),
      "parts_": shared(2, config.flush, block.rows, block.quads, 4),
    },
    compiler_params=tiles.compiler_params(),
    kernel_name=NAME,
  )
  found = dict(zip(out_type, kernel(*operands.values()), strict=True))
  for name in ("dA", "dstate", "dBC"):
    found[name] = found[name].reshape(*found[name].shape[:-2], size)
  both = found.pop("dBC")
  found |= {"dB": both[:, :, 0], "dC": both[:, :, 1]}
  return found


def _parts_layout(tokens: int, block: tiles.Block) -> plgpu.Layout:
  """Lays out (2, tokens, rows, N / 4, 4) for sums over the rows.

  Most rows are in a thread, and its neighbours' are next to these, where they
  lie in other banks.
  """
  states = (block.quads, 4)
  whole = (2, tokens, block.rows, *states)
  half = (tokens // 2, block.rows, *states)
  neighbours = 64 // (tokens * block.quads)
  if neighbours == 1:
    tiling = plgpu.Tiling((whole, half))
    return plgpu.Layout.TILED(tiling, (-9, -8), (-4, -2), -1)
  tiling = plgpu.Tiling((whole, half, (neighbours, *states)))
  return plgpu.Layout.TILED(tiling, (-12, -11), (-7, -3, -2), -1)
