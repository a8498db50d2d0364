"""The second kernel of a layer, for a state in int8: its step, and the gate.

It moves 2 P N bytes a row and head, so few that instructions are the limit:
levels become floats and floats levels by their bits. A thread block takes some
heads of a row in turn, and the states of the next ones are on their way to
shared memory, and those of the last ones from there, while one is stepped.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper import PROCESSORS
from ops.mamba2_step import mosaic_gpu_codes as codes
from ops.mamba2_step import mosaic_gpu_product as product
from ops.mamba2_step.mosaic_gpu_state import CHANNELS, HEAD
from ops.quantized import QState
from ops.selective_scan.mosaic_gpu_tile import sigmoid, softplus

NAME = "mamba2_step_state"
# Steps of each of four warpgroups a multiprocessor with which
# `mosaic_gpu_state_levels` was found faster: with 64 rows of 80 heads on an
# H200 it took 29.0 microseconds, and this kernel 37.8.
LEVELS_PAY = 8
_LARGEST = 127.0
# The least step whose inverse is finite.
_LEAST = 2.0**-126


def layout_of(size: int, values: int):
  """The layout of a state (HEAD, N).

  Eight threads hold as many lines of four rows, so that sums over N take three
  shuffles.

  Args:
    size: N.
    values: Side by side in a thread, at most N / 8.
  """
  line = 8 * values
  return plgpu.Layout.TILED(
    plgpu.Tiling(((HEAD, line), (16, line), (4, line), (values,))),
    (-7,), (-3, -2), -1,
  )  # fmt: skip


def configure(steps: int) -> dict[str, int]:
  """Fields of the Config for states in int8.

  Args:
    steps: Rows times heads.
  """
  warpgroups = 4 if steps > 4 * PROCESSORS else 1
  # A line begins with some hundred instructions, which several steps share.
  levels = steps >= 4 * PROCESSORS * LEVELS_PAY
  return {
    "state_levels": levels,
    "state_blocks": PROCESSORS * 4 // warpgroups,
    "state_warpgroups": warpgroups,
    "state_stages": 4,
  }


def unfit(state: QState) -> str | None:
  """Returns None if the kernel takes a state in few bits, else why not."""
  form = state.tensor.format
  if form.dtype != "int8" or form.packed or not form.symmetric:
    return f"needs a state in float32 or int8, ssm_state is in {form}"
  if (
    state.tensor.num_blocks != 1
    or state.tensor.scales.shape[:-1] != (state.shape[:-1])
  ):
    return f"needs a scale a (head, channel), ssm_state is in {form}"
  if state.static or state.residual is not None or state.noise is not None:
    return "needs a state whose scales follow it, rounded to nearest"
  return None


def _nearest(state, layout, scale_dtype, interpret):
  """Levels and scales of a state in int8, as `ops.quantize` finds them."""
  largest = jnp.max(jnp.abs(state), axis=1)
  steps = (largest * (1 / _LARGEST)).astype(scale_dtype)
  wide = steps.astype(jnp.float32)
  some = wide >= _LEAST
  inverse = jnp.where(some, 1 / jnp.where(some, wide, 1.0), 0.0)
  levels = state * hopper_tiles.repeat(inverse, 0, state.shape, layout)
  if jnp.finfo(scale_dtype).minexp > jnp.finfo(jnp.float32).minexp:
    # Others are so near to largest / 127 that no level is beyond 127.5.
    levels = jnp.clip(levels, -_LARGEST, _LARGEST)
  return codes.to_codes(levels + codes.WHOLE, layout, interpret), steps


def share(steps: int, config) -> tuple[int, int]:
  """Steps that a warpgroup takes in turn, and states in its shared memory."""
  each = -(-steps // (config.state_blocks * config.state_warpgroups))
  return each, min(max(config.state_stages, 2), each)


def launch(
  kernel, ring, layer, projected, weights, ssm_state, rows, *, config, interpret
) -> tuple[jax.Array, jax.Array]:
  """Runs a kernel whose warpgroups take a `share` of the steps each.

  Args:
    kernel: Takes references to all operands and results, and "ring_s",
      "loaded" and "squares_s", which are those of all warpgroups.
    ring: The first of these, (warpgroups, states, P, N).
    layer: As `advance` takes it, and all others.
    projected: Alike.
    weights: Alike.
    ssm_state: Alike.
    rows: Alike.
    config: Alike.
    interpret: Alike.

  Returns:
    What `advance` does.
  """
  values, scales = ssm_state.tensor.values, ssm_state.tensor.scales
  batch, heads, p, _ = values.shape[1:]
  workers = config.state_warpgroups
  each, stages = share(batch * heads, config)
  padded = -(-heads // product.PARTIALS) * product.PARTIALS
  run = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((rows, heads * p), jnp.bfloat16),
      jax.ShapeDtypeStruct((rows, padded), jnp.float32),
    ),
    grid=(-(-batch * heads // (each * workers)),),
    grid_names=("blocks",),
    num_threads=workers,
    thread_name="warpgroup",
    scratch_types={
      "ring_s": ring,
      "loaded": plgpu.Barrier(num_barriers=workers * stages),
      "squares_s": plgpu.SMEM((workers, p), jnp.float32),
    },
    kernel_name=NAME,
    compiler_params=dataclasses.replace(
      # No two threads meet in memory but where `commit_smem` stands.
      hopper_tiles.compiler_params(), unsafe_no_auto_barriers=True
    ),
    interpret=interpret,
  )  # fmt: skip
  return run(
    layer, projected, weights.dt_bias, weights.A_log, weights.D,
    weights.gated_norm, values, scales,
  )  # fmt: skip


def advance(
  layer, projected, weights, ssm_state, rows, *, config, interpret
) -> tuple[jax.Array, jax.Array]:
  """Steps the states in place; returns what `out_proj` takes.

  Args:
    layer: (1,) int32.
    projected: Of `mosaic_gpu_in.project`.
    weights: Of all layers, as `mosaic_gpu.layer` makes them.
    ssm_state: A QState of references to (L, B, H, P, N) int8 and scales.
    rows: N of the results, of which those past the batch are not written.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    g = y * silu(z) times the scale of the gated norm, (N, E) bfloat16, and
    parts of the sum of the squares of g in the columns of a group's heads, of
    which some are zero, (N, H filled up) float32.
  """
  refs = [ssm_state.tensor.values, ssm_state.tensor.scales]
  batch, heads, p, n = refs[0].shape[1:]
  e = heads * p
  channels = weights.conv_weight.shape[-1]
  groups = (channels - e) // (2 * n)
  heads_of_group = heads // groups
  shape = p, n
  layout = layout_of(n, n // 8)
  per_row, per_column = layout.reduce(1), layout.reduce(0)
  steps = batch * heads
  workers = config.state_warpgroups
  each, stages = share(steps, config)
  # Of a step, which is one of a row and head.
  row_of = lambda step: lax.div(step, jnp.int32(heads))
  head_of = lambda step: lax.rem(step, jnp.int32(heads))
  group_of = lambda head: lax.div(head, jnp.int32(heads_of_group))
  interpreted = bool(interpret)

  def kernel(
    layer_ref, projected_ref, dt_bias_ref, A_log_ref, D_ref, scale_ref,
    *refs, ring_s, loaded, squares_s,
  ):  # fmt: skip
    *state_refs, out_ref, squares_ref = refs
    layer, me = layer_ref[0], lax.axis_index("warpgroup")
    first = (lax.axis_index("blocks") * workers + me) * each
    ring_s, squares_s = ring_s.at[me], squares_s.at[me]
    barrier = lambda slot: loaded.at[me * stages + slot]
    count = jnp.minimum(each, steps - first)
    states = state_refs[0].at[layer]

    def fetch(i):
      slot = lax.rem(jnp.int32(i), jnp.int32(stages))
      own = states.at[row_of(first + i), head_of(first + i)]
      plgpu.copy_gmem_to_smem(own, ring_s.at[slot], barrier(slot))

    def inputs(i):
      """What a step begins with."""
      step = jnp.minimum(first + i, steps - 1)
      row, head = row_of(step), head_of(step)
      projected = projected_ref.at[row]
      of_head = lambda ref: ref[layer, head].astype(jnp.float32)
      x = hopper_tiles.load(projected.at[pl.ds(e + head * p, p)], per_row)
      found = [x, projected[e + channels + head], of_head(dt_bias_ref)]
      found += [of_head(A_log_ref), of_head(D_ref)]
      scales = state_refs[1].at[layer, row, head, :, 0]
      found.append(hopper_tiles.load(scales, per_row))
      return tuple(found)

    for i in range(stages):
      pl.when(i < count)(lambda i=i: fetch(i))
    if config.overlap and not interpreted:
      plgpu.griddepcontrol_launch_dependents()
      plgpu.griddepcontrol_wait()

    def step(i, carry):
      (x, dt, dt_bias, A_log, D, scales), squares = carry
      following = inputs(jnp.minimum(i + 1, count - 1))
      row, head = row_of(first + i), head_of(first + i)
      slot, group = lax.rem(i, jnp.int32(stages)), group_of(head)
      projected, own = projected_ref.at[row], pl.ds(head * p, p)
      z = hopper_tiles.load(projected.at[own], per_row)
      scale = hopper_tiles.load(scale_ref.at[layer, own], per_row)
      B, C = (
        hopper_tiles.load(projected.at[pl.ds(e + e + k * n, n)], per_column)
        for k in (group, groups + group)
      )
      dt = softplus(dt + dt_bias)
      decay = jnp.exp(-dt * jnp.exp(A_log))
      plgpu.barrier_wait(barrier(slot))
      state = plgpu.load(ring_s.at[slot], layout=layout, optimized=False)
      state = codes.to_floats(state, layout, interpreted)
      decay = hopper_tiles.repeat(decay * scales, 0, shape, layout)
      update = hopper_tiles.repeat(dt * x, 0, shape, layout)
      state = decay * state + update * hopper_tiles.repeat(B, 1, shape, layout)
      y = jnp.sum(state * hopper_tiles.repeat(C, 1, shape, layout), axis=1)

      @pl.when((i > 0) & (i - 1 + stages < count))
      def _():
        # The state in front of this one has left shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        fetch(i - 1 + stages)

      scales_ref = state_refs[1].at[layer, row, head, :, 0]
      state, scales = _nearest(state, layout, scales_ref.dtype, interpreted)
      # A thread writes where it has read.
      hopper_tiles.store(ring_s.at[slot], state)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(ring_s.at[slot], states.at[row, head])
      hopper_tiles.store(scales_ref, scales)
      gated = (y + D * x) * z * sigmoid(z)
      hopper_tiles.store(
        out_ref.at[row, own], (gated * scale).astype(out_ref.dtype)
      )

      squares += gated * gated
      # The last step of this block in a row and group sums up.
      ends = (i + 1 == count) | (group_of(head + 1) != group)

      @pl.when(ends)
      def _():
        hopper_tiles.store(squares_s, squares)
        plgpu.commit_smem()
        total = jnp.sum(hopper_tiles.load(squares_s, CHANNELS))
        hopper_tiles.store(squares_ref.at[row, head], total)

      @pl.when(jnp.logical_not(ends))
      def _():
        hopper_tiles.store(squares_ref.at[row, head], jnp.float32(0.0))

      return following, jnp.where(ends, 0.0, squares)

    none = plgpu.layout_cast(jnp.zeros((p,), jnp.float32), per_row)
    lax.fori_loop(jnp.int32(0), count, step, (inputs(0), none))
    plgpu.wait_smem_to_gmem(0)

  ring = plgpu.SMEM((workers, stages, *shape), refs[0].dtype)
  return launch(
    kernel, ring, layer, projected, weights, ssm_state, rows, config=config,
    interpret=interpret,
  )  # fmt: skip
