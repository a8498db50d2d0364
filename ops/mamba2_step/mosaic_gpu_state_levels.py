"""The second kernel of a layer, for a state in int8, counted in its levels.

A row p of a state is d_p L_p, with levels L_p and a factor d_p of decay and
scale. After the step it is d_p (L_p + r_p B), so one multiplication a number
does for decay, scale and update. Its product with C needs no floats:
d_p (L_p C) + u_p (B C), of which the matrix unit gives the first sum from the
levels, see `mosaic_gpu_levels`, and the second one is one number a row and
group.

A thread block takes some heads of a row in turn, and the states of the next
ones are on their way to shared memory, and those of the last ones from there,
while one is stepped.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.mamba2_step import mosaic_gpu_codes as codes
from ops.mamba2_step import mosaic_gpu_levels as levels_of
from ops.mamba2_step import mosaic_gpu_state_few_bits as few_bits
from ops.mamba2_step.mosaic_gpu_state import CHANNELS
from ops.selective_scan.mosaic_gpu_tile import softplus

_LARGEST = 127.0
# The least number whose inverse is finite.
_LEAST = 2.0**-126
# What has decayed so much beside the update counts nothing.
_FORGOTTEN = 2.0**-100


def _divided(a, b: int):
  """The quotient and the rest."""
  return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


def _is_narrow(scale_dtype):
  """Whether scales may be so far from what they are that levels are > 127.5."""
  return jnp.finfo(scale_dtype).minexp > jnp.finfo(jnp.float32).minexp


def advance(
  layer, projected, weights, ssm_state, rows, *, config, interpret
) -> tuple[jax.Array, jax.Array]:
  """Steps the states in place, as `mosaic_gpu_state_few_bits.advance` does.

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
  # Steps, which are one of a row and head, of a line, one of a row and group.
  length = heads // groups
  shape = p, n
  layout = levels_of.layout_of(n)
  per_row, per_word = layout.reduce(1), levels_of.layout_of_words(n)
  per_digit = levels_of.layout_of_digits(n).reduce(0)
  steps = batch * heads
  workers = config.state_warpgroups
  each, stages = few_bits.share(steps, config)
  interpreted = bool(interpret)
  inverse = lambda v: levels_of.inverse(v, per_row, interpreted)
  over_rows = lambda v: hopper_tiles.repeat(v, 0, shape, layout)

  def kernel(
    layer_ref, projected_ref, dt_bias_ref, A_log_ref, D_ref, scale_ref,
    *refs, ring_s, loaded, squares_s,
  ):  # fmt: skip
    *state_refs, out_ref, squares_ref = refs
    layer, me = layer_ref[0], lax.axis_index("warpgroup")
    first = (lax.axis_index("blocks") * workers + me) * each
    end = jnp.minimum(first + each, steps)
    ring_s, squares_s = ring_s.at[me], squares_s.at[me]
    barrier = lambda slot: loaded.at[me * stages + slot]
    states = state_refs[0].at[layer]

    def fetch(step):
      slot = lax.rem(step - first, jnp.int32(stages))
      row, head = _divided(step, heads)
      plgpu.copy_gmem_to_smem(
        states.at[row, head], ring_s.at[slot], barrier(slot)
      )

    for i in range(stages):
      pl.when(first + i < end)(lambda i=i: fetch(first + i))
    if config.overlap and not interpreted:
      plgpu.griddepcontrol_launch_dependents()
      plgpu.griddepcontrol_wait()

    def take_line(line, _):
      row, group = _divided(line, groups)
      begin = line * length
      start = jnp.maximum(begin, first)
      stop = jnp.minimum(begin + length, end)
      # The head of a step.
      offset = group * length - begin
      projected = projected_ref.at[row]
      kept = lambda k, way: hopper_tiles.load(
        projected.at[pl.ds(e + e + (k * groups + group) * n, n)], way
      )
      B, C = kept(0, per_digit), kept(1, per_digit)
      digits, unit = levels_of.digits_of(C)
      both = jnp.sum(B * C)
      B = levels_of.words_of(kept(0, per_word), interpreted)

      def inputs(step):
        """What a step begins with."""
        head = step + offset
        of_row = lambda ref, at: hopper_tiles.load(
          ref.at[pl.ds(at + head * p, p)], per_row
        )
        of_head = lambda ref: ref[layer, head].astype(jnp.float32)
        scales = state_refs[1].at[layer, row, head, :, 0]
        return (
          of_row(projected, e),
          of_row(projected, 0),
          of_row(scale_ref.at[layer], 0),
          hopper_tiles.load(scales, per_row),
          projected[e + channels + head],
          of_head(dt_bias_ref),
          of_head(A_log_ref),
          of_head(D_ref),
        )

      def take(step, carry):
        (x, z, scale, scales, dt, dt_bias, A_log, D), squares = carry
        following = inputs(jnp.minimum(step + 1, stop - 1))
        head = step + offset
        slot = lax.rem(step - first, jnp.int32(stages))
        own = pl.ds(head * p, p)
        dt = softplus(dt + dt_bias)
        update = dt * x
        factor = jnp.exp(-dt * jnp.exp(A_log)) * scales
        factor = jnp.maximum(factor, _FORGOTTEN * jnp.abs(update))
        factor = jnp.maximum(factor, _LEAST)
        plgpu.barrier_wait(barrier(slot))
        kept = plgpu.load(ring_s.at[slot], layout=layout, optimized=False)
        y = levels_of.weigh(kept, digits, interpreted) * unit
        y = factor * y + update * both + D * x
        state, largest = levels_of.update(
          kept, update * inverse(factor), B, interpreted
        )
        largest *= factor

        @pl.when((step > first) & (step - 1 + stages < end))
        def _():
          # The state in front of this one has left shared memory.
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          fetch(step - 1 + stages)

        scales_ref = state_refs[1].at[layer, row, head, :, 0]
        scales = (largest * (1 / _LARGEST)).astype(scales_ref.dtype)
        wide = scales.astype(jnp.float32)
        factor *= inverse(jnp.maximum(wide, _LEAST))
        factor = jnp.where(wide >= _LEAST, factor, 0.0)
        state *= over_rows(factor)
        if _is_narrow(scales_ref.dtype):
          state = jnp.clip(state, -_LARGEST, _LARGEST)
        state += codes.WHOLE
        # A thread writes where it has read.
        hopper_tiles.store(
          ring_s.at[slot], codes.to_codes(state, layout, interpreted)
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ring_s.at[slot], states.at[row, head])
        hopper_tiles.store(scales_ref, scales)
        gated = y * z * inverse(1 + jnp.exp(-z))
        hopper_tiles.store(
          out_ref.at[row, own], (gated * scale).astype(out_ref.dtype)
        )

        @pl.when(step + 1 < stop)
        def _():
          hopper_tiles.store(squares_ref.at[row, head], jnp.float32(0.0))

        return following, squares + gated * gated

      none = plgpu.layout_cast(jnp.zeros((p,), jnp.float32), per_row)
      _, squares = lax.fori_loop(start, stop, take, (inputs(start), none))
      # The last head of this worker in a line has the sum of all.
      hopper_tiles.store(squares_s, squares)
      plgpu.commit_smem()
      total = jnp.sum(hopper_tiles.load(squares_s, CHANNELS))
      hopper_tiles.store(squares_ref.at[row, stop - 1 + offset], total)
      return ()

    begin = lax.div(first, jnp.int32(length))
    behind = lax.div(end - 1, jnp.int32(length)) + 1
    lax.fori_loop(begin, jnp.where(first < end, behind, begin), take_line, ())
    plgpu.wait_smem_to_gmem(0)

  ring = hopper_tiles.swizzled((workers, stages, *shape), refs[0].dtype, 8)
  return few_bits.launch(
    kernel, ring, layer, projected, weights, ssm_state, rows, config=config,
    interpret=interpret,
  )  # fmt: skip
