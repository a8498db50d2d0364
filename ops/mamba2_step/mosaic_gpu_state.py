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


def advance(
  layer, projected, weights, ssm_state, rows, *, config, interpret
) -> tuple[jax.Array, jax.Array]:
  """Steps the states in place; returns what `out_proj` takes.

  Args:
    layer: (1,) int32.
    projected: Of `mosaic_gpu_in.project`.
    weights: Of all layers, as `mosaic_gpu.layer` makes them.
    ssm_state: A reference to (L, B, H, P, N) float32.
    rows: N of the results, of which those past the batch are not written.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    g = y * silu(z) times the scale of the gated norm, (N, E) bfloat16, and the
    sum of the squares of g of every head, (N, H filled up) float32.
  """
  batch, heads, p, n = ssm_state.shape[1:]
  e = heads * p
  channels = weights.conv_weight.shape[-1]
  groups = (channels - e) // (2 * n)
  shape = (p, n)

  def kernel(
    layer_ref, projected_ref, dt_bias_ref, A_log_ref, D_ref, scale_ref,
    state_ref, out_ref, squares_ref, *, y_s,
  ):  # fmt: skip
    if config.overlap and not interpret:
      plgpu.griddepcontrol_launch_dependents()
      plgpu.griddepcontrol_wait()
    layer = layer_ref[0]
    head, row = lax.axis_index("head"), lax.axis_index("row")
    own_state = state_ref.at[layer, row, head]
    state = hopper_tiles.load(own_state, STATE)
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

    update = hopper_tiles.repeat(dt * s, 0, shape, STATE)
    state = decay * state + update * hopper_tiles.repeat(B, 1, shape, STATE)
    y = jnp.sum(state * hopper_tiles.repeat(C, 1, shape, STATE), axis=1)
    hopper_tiles.store(own_state, state)
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
    weights.gated_norm, ssm_state,
  )  # fmt: skip
