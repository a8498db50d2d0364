"""The second kernel of a layer: the step of the state, and the gate.

It moves 8 P N bytes a row and head and does little else, so all loads of a
block are started at once, and few registers let several blocks share a
multiprocessor.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.mamba2_step import mosaic_gpu_product as product
from ops.quantized import QState
from ops.selective_scan.mosaic_gpu_tile import sigmoid, softplus

NAME = "mamba2_step_state"
# Channels of a head, which a block's four warps share.
HEAD = 64
# The state, (HEAD, N): eight threads hold a line of 32 values of four rows, so
# that sums over N take three shuffles.
STATE = plgpu.Layout.TILED(
  plgpu.Tiling(((HEAD, 32), (16, 32), (4, 32), (4,))), (-7,), (-3, -2), -1
)
# A vector over the channels of a head, whole in each warp.
CHANNELS = plgpu.Layout.TILED(
  plgpu.Tiling(((HEAD,), (2,))), (plgpu.Replicated(4),), (-2,), -1
)


# Added and subtracted, it leaves the nearest whole number, the even one of two.
_WHOLE = 1.5 * 2.0**23
_LARGEST = 127.0


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


def nearest(state, scale_dtype, layout):
  """Levels and scales of a state in int8, as `ops.quantize` finds them."""
  largest = jnp.max(jnp.abs(state), axis=1)
  steps = (largest * (1 / _LARGEST)).astype(scale_dtype)
  wide = steps.astype(jnp.float32)
  inverse = jnp.where(wide > 0, 1 / jnp.where(wide > 0, wide, 1.0), 0.0)
  levels = state * product.repeat(inverse, 0, state.shape, layout)
  levels = (levels + _WHOLE) - _WHOLE
  levels = jnp.clip(levels, -_LARGEST, _LARGEST)
  return levels.astype(jnp.int8), steps


def advance(
  layer, projected, weights, ssm_state, rows, *, config, interpret
) -> tuple[jax.Array, jax.Array]:
  """Steps the states in place; returns what `out_proj` takes.

  Args:
    layer: (1,) int32.
    projected: Of `mosaic_gpu_in.project`.
    weights: Of all layers, as `mosaic_gpu.layer` makes them.
    ssm_state: A reference to (L, B, H, P, N) float32, or a QState of them.
    rows: N of the results, of which those past the batch are not written.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    g = y * silu(z) times the scale of the gated norm, (N, E) bfloat16, and the
    sum of the squares of g of every head, (N, H filled up) float32.
  """
  few_bits = isinstance(ssm_state, QState)
  refs = [ssm_state]
  if few_bits:
    refs = [ssm_state.tensor.values, ssm_state.tensor.scales]
  batch, heads, p, n = refs[0].shape[1:]
  e = heads * p
  channels = weights.conv_weight.shape[-1]
  groups = (channels - e) // (2 * n)
  shape = (p, n)

  def kernel(
    layer_ref, projected_ref, dt_bias_ref, A_log_ref, D_ref, scale_ref,
    *refs, y_s,
  ):  # fmt: skip
    if config.overlap and not interpret:
      plgpu.griddepcontrol_launch_dependents()
      plgpu.griddepcontrol_wait()
    *state_refs, out_ref, squares_ref = refs
    layer = layer_ref[0]
    head, row = lax.axis_index("head"), lax.axis_index("row")
    state_refs = [ref.at[layer, row, head] for ref in state_refs]
    state = hopper_tiles.load(state_refs[0], STATE)
    if few_bits:
      steps = hopper_tiles.load(state_refs[1].at[:, 0], STATE.reduce(1))
      state *= product.repeat(steps, 0, shape, STATE)
    projected = projected_ref.at[row]
    own = pl.ds(head * p, p)
    first = e + e + lax.div(head, jnp.int32(heads // groups)) * n
    s = hopper_tiles.load(projected.at[pl.ds(e + head * p, p)], STATE.reduce(1))
    B = hopper_tiles.load(projected.at[pl.ds(first, n)], STATE.reduce(0))
    C = hopper_tiles.load(
      projected.at[pl.ds(first + groups * n, n)], STATE.reduce(0)
    )
    z = hopper_tiles.load(projected.at[own], CHANNELS)
    scale = hopper_tiles.load(scale_ref.at[layer, own], CHANNELS)
    of_head = lambda ref: ref[layer, head].astype(jnp.float32)
    dt = softplus(projected[e + channels + head] + of_head(dt_bias_ref))
    decay = jnp.exp(-dt * jnp.exp(of_head(A_log_ref)))

    update = product.repeat(dt * s, 0, shape, STATE)
    state = decay * state + update * product.repeat(B, 1, shape, STATE)
    y = jnp.sum(state * product.repeat(C, 1, shape, STATE), axis=1)
    if few_bits:
      state, steps = nearest(state, state_refs[1].dtype, STATE)
      hopper_tiles.store(state_refs[1].at[:, 0], steps)
    hopper_tiles.store(state_refs[0], state)
    hopper_tiles.store(y_s, y + of_head(D_ref) * s)
    gated = hopper_tiles.load(y_s, CHANNELS) * z * sigmoid(z)
    hopper_tiles.store(
      out_ref.at[row, own], (gated * scale).astype(out_ref.dtype)
    )
    hopper_tiles.store(squares_ref.at[row, head], jnp.sum(gated * gated))

  padded = -(-heads // product.PARTIALS) * product.PARTIALS
  run = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((rows, e), jnp.bfloat16),
      jax.ShapeDtypeStruct((rows, padded), jnp.float32),
    ),
    grid=(heads, batch),
    grid_names=("head", "row"),
    scratch_types={"y_s": plgpu.SMEM((p,), jnp.float32)},
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(
    layer, projected, weights.dt_bias, weights.A_log, weights.D,
    weights.gated_norm, *refs,
  )  # fmt: skip
