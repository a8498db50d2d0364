"""The backward GPU kernel of the selective scan."""

import dataclasses

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
  group, in registers. Sums over the states of a channel are shuffles. For sums
  over channels, all threads write their part to shared memory, and each then
  sums a few of them.

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
  streamed = [n for n in ("x", "dt", "dy", "z") if n in operands]
  results = {"x": "dx", "dt": "ddt"} | ({"z": "dz"} if "z" in operands else {})
  sums = [n for n in ("D", "dt_bias") if n in operands]
  per_channel = jax.ShapeDtypeStruct((batch, channels, size), jnp.float32)
  per_token = jax.ShapeDtypeStruct(
    (num_blocks, batch, length, size), jnp.float32
  )
  out_type = {
    name: jax.ShapeDtypeStruct(x.shape, operands[source].dtype)
    for source, name in results.items()
  }
  out_type |= {"dA": per_channel, "dstate": per_channel}
  out_type |= {"dB": per_token, "dC": per_token}
  for name in sums:
    out_type["d" + name] = jax.ShapeDtypeStruct((batch, channels), jnp.float32)

  def body(
    *refs, raw, ready, dt_, u_, v_, y_, du_, ddt_, B_, C_, h_, **scratch
  ):
    sums_, parts_ = scratch["sums_"], scratch["parts_"]
    given = dict(zip(names, refs[: len(names)], strict=True))
    out = dict(zip(out_type, refs[len(names) :], strict=True))
    row, number = lax.axis_index("batch"), lax.axis_index("blocks")
    first = number * block.channels
    own = pl.ds(first, block.channels)
    slabs = [
      pl.ds(first + i * block.rows, block.rows) for i in range(block.slabs)
    ]
    decays = [tiles.load(given["A"].at[s], block.states) for s in slabs]

    def fetch(index, slot):
      tokens = pl.ds(index * block.tile, block.tile)
      sources = {name: given[name].at[row, tokens, own] for name in streamed}
      for name in ("B", "C"):
        sources[name] = given[name].at[row, tokens, first // per_group]
      if "marks" in given:
        sources["marks"] = given["marks"].at[row, :, tokens]
      for name, source in sources.items():
        target = raw[name].at[slot]
        plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

    def biased(slot):
      dt = block.load_tokens(raw["dt"].at[slot])
      if "dt_bias" in given:
        dt = dt + block.over_tokens(given["dt_bias"].at[own])
      return dt

    def enter(slot):
      """Prepares dt, u, v, B and C of a tile in shared memory."""
      dt = biased(slot)
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
      """Returns [token][slab] states in front of and after tokens, decays."""
      before, after, factors = [], [], []
      states = [
        tiles.load(h_.at[group, block.slab(i)], block.states)
        for i in range(block.slabs)
      ]
      for k in range(config.unroll):
        token = group * config.unroll + k
        before.append(states)
        pairs = [advance(h, i, token, slot) for i, h in enumerate(states)]
        factors.append([decay for decay, _ in pairs])
        states = [h for _, h in pairs]
        after.append(states)
        if "z" in given:
          C_t = block.over_rows(C_.at[token])
          for i, h in enumerate(states):
            y_[token, block.slab(i)] = jnp.sum(h * C_t, axis=1)
      return before, after, factors

    def step_back(token, k, carry, before, after, factors):
      """Goes back by a token; the carry is (a_{t+1} g_{t+1}, dA) a slab."""
      B_t, C_t = block.over_rows(B_.at[token]), block.over_rows(C_.at[token])
      part_B, part_C, following = 0.0, 0.0, []
      for i, (ag, dA) in enumerate(carry):
        slab = block.slab(i)
        v = block.over_states(v_.at[token, slab])
        g = C_t * v + ag
        part_C = part_C + v * after[i]
        part_B = part_B + block.over_states(u_.at[token, slab]) * g
        du_[token, slab] = jnp.sum(g * B_t, axis=1)
        ag = factors[i] * g
        p = ag * before[i]
        ddt_[token, slab] = jnp.sum(p * decays[i], axis=1)
        dA = dA + p * block.over_states(dt_.at[token, slab])
        following.append((ag, dA))
      parts_[0, k % config.flush] = part_B
      parts_[1, k % config.flush] = part_C
      return following

    def flush(token):
      """Sums the parts of dB and dC of `flush` tokens over channels."""
      plgpu.commit_smem()
      layout = _parts_layout(config.flush, block)
      for i in range(2):
        parts = tiles.load(parts_.at[i], layout)
        sums_[i, pl.ds(token, config.flush)] = jnp.sum(parts, axis=1)
      plgpu.commit_smem()

    def some_tokens_back(step, carry, slot):
      group = block.tile // config.unroll - 1 - step
      before, after, factors = recompute(group, slot)
      for k in reversed(range(config.unroll)):
        token = group * config.unroll + k
        carry = step_back(token, k, carry, before[k], after[k], factors[k])
        if k % config.flush == 0:
          flush(token)
      return carry

    def leave(slot, totals):
      """Turns a tile's sums into dx, ddt and dz, in place of the inputs."""
      x = block.load_tokens(raw["x"].at[slot])
      du, v = block.load_tokens(du_), block.load_tokens(v_)
      ddt = block.load_tokens(ddt_) * tiles.LN2 + du * x
      if "marks" in given:
        ddt = ddt * block.over_channels(raw["marks"].at[slot, 1])
      if dt_softplus:
        ddt = ddt * tiles.sigmoid(biased(slot))
      dx = du * block.load_tokens(dt_)
      terms = {"D": v * x, "dt_bias": ddt}
      if "D" in given:
        skip = block.over_tokens(given["D"].at[own])
        dx = dx + v * skip
      if "z" in given:
        y = block.load_tokens(y_)
        if "D" in given:
          y = y + skip * x
        z = block.load_tokens(raw["z"].at[slot])
        gate = tiles.sigmoid(z)
        dy = block.load_tokens(raw["dy"].at[slot])
        dz = dy * y * gate * (1.0 + z * (1.0 - gate))
        raw["z"][slot] = dz.astype(raw["z"].dtype)
      raw["x"][slot] = dx.astype(raw["x"].dtype)
      raw["dt"][slot] = ddt.astype(raw["dt"].dtype)
      return [t + terms[n] for n, t in zip(sums, totals, strict=True)]

    def one_tile(step, carry):
      index = num_tiles - 1 - step
      slot = lax.rem(step, config.stages)
      carry, totals = carry
      plgpu.barrier_wait(ready.at[slot])
      enter(slot)
      plgpu.commit_smem()
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
        lambda step, carry: some_tokens_back(step, carry, slot),
        carry,
      )
      totals = leave(slot, totals)
      plgpu.commit_smem()
      tokens = pl.ds(index * block.tile, block.tile)
      for source, name in results.items():
        target = out[name].at[row, tokens, own]
        plgpu.copy_smem_to_gmem(raw[source].at[slot], target)
      for i, name in enumerate(("dB", "dC")):
        target = out[name].at[number, row, tokens]
        plgpu.copy_smem_to_gmem(sums_.at[i], target)
      return carry, totals

    for step in range(min(config.stages, num_tiles)):
      fetch(num_tiles - 1 - step, step)
    zeros = jnp.zeros((block.rows, size), jnp.float32)
    zeros = plgpu.layout_cast(zeros, block.states)
    carry = [
      (tiles.load(given["dfinal"].at[row, slab], block.states), zeros)
      for slab in slabs
    ]
    none = jnp.zeros((block.tile, block.channels), jnp.float32)
    totals = [plgpu.layout_cast(none, block.tokens)] * len(sums)
    carry, totals = lax.fori_loop(0, num_tiles, one_tile, (carry, totals))
    for slab, (ag, dA) in zip(slabs, carry, strict=True):
      out["dstate"][row, slab] = ag
      out["dA"][row, slab] = dA
    for name, total in zip(sums, totals, strict=True):
      out["d" + name][row, own] = jnp.sum(total, axis=0)
    plgpu.wait_smem_to_gmem(0)

  shared = lambda *shape, dtype=jnp.float32: plgpu.SMEM(shape, dtype)
  wide = (block.tile, block.channels)
  narrow = (block.tile, size)
  raw_shapes = {name: wide for name in streamed}
  raw_shapes |= {"B": narrow, "C": narrow}
  if "marks" in operands:
    raw_shapes["marks"] = (2, block.tile)
  kernel = plgpu.kernel(
    body,
    out_type=list(out_type.values()),
    grid=(num_blocks, batch),
    grid_names=("blocks", "batch"),
    scratch_types={
      "raw": {
        name: shared(config.stages, *shape, dtype=operands[name].dtype)
        for name, shape in raw_shapes.items()
      },
      "ready": plgpu.Barrier(
        num_arrivals=len(raw_shapes), num_barriers=config.stages
      ),
      "dt_": shared(*wide),
      "u_": shared(*wide),
      "v_": shared(*wide),
      "y_": shared(*wide),
      "du_": shared(*wide),
      "ddt_": shared(*wide),
      "B_": shared(*narrow),
      "C_": shared(*narrow),
      "h_": shared(block.tile // config.unroll, block.channels, size),
      "sums_": shared(2, *narrow),
      "parts_": shared(2, config.flush, block.rows, size),
    },
    compiler_params=tiles.compiler_params(),
    kernel_name=NAME,
  )
  return dict(zip(out_type, kernel(*operands.values()), strict=True))


def _parts_layout(tokens: int, block: tiles.Block) -> plgpu.Layout:
  """Lays out (tokens, rows, N) with `tokens` of the rows in each thread."""
  whole, quarter = (block.rows, block.size), (tokens, 4)
  if tokens == 4:
    tiling = plgpu.Tiling(((4, *whole), quarter))
    return plgpu.Layout.TILED(tiling, (-5,), (-4, -3), -1)
  tiling = plgpu.Tiling(((tokens, *whole), (tokens // 4, *whole), quarter))
  return plgpu.Layout.TILED(tiling, (-8,), (-5, -4, -3), -1)
