"""The selective scan on Hopper GPUs: supports, config and gradients.

The kernels are in `mosaic_gpu_forward` and `mosaic_gpu_backward`. The forward
kernel saves a state every few tokens, from which the backward kernel finds the
others again; the bias, softplus, skip, gate, padding and resets are fused.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.hopper import PROCESSORS
from ops.selective_scan import mosaic_gpu_tile as tiles
from ops.selective_scan.mosaic_gpu_backward import BackwardConfig, backward
from ops.selective_scan.mosaic_gpu_forward import ForwardConfig, forward

RESET, PADDING = 1, 2
SIZES = (8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Config:
  """How both kernels are cut.

  The saved states take 4 N / backward.tile bytes a channel and token.
  """

  forward: ForwardConfig = ForwardConfig()
  backward: BackwardConfig = BackwardConfig()


@dataclasses.dataclass(frozen=True)
class _Options:
  dt_softplus: bool
  config: Config


def supports(
  x=None, dt=None, A=None, B=None, C=None, *rest, **options
) -> str | None:
  """Returns why the kernels do not run on these arrays here, or None."""
  if reason := dispatch.needs_hopper():
    return reason
  return None if x is None else unsupported_shapes(x, dt, A, B, C, *rest)


def unsupported_shapes(x, dt, A, B, C, *rest) -> str | None:
  """Returns what about shapes and dtypes the kernels cannot do, or None."""
  z = rest[1] if len(rest) > 1 else None
  for name, array in {"x": x, "dt": dt, "B": B, "C": C, "z": z}.items():
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name} is {array.dtype}, not bfloat16 or float32"
  if A.shape[1] > SIZES[-1]:
    return f"{A.shape[1]} states a channel, more than {SIZES[-1]}"
  return None


def choose_config(
  batch: int,
  channels: int,
  groups: int,
  size: int,
  processors: int = PROCESSORS,
) -> Config:
  """Returns the config for a shape on a GPU of so many multiprocessors.

  By counts of machine instructions a token, 64 channels take 1.9 times (76 to
  41) those of 32 forward and 1.75 times (211 to 121) backward. So forward
  blocks are wide where the busiest multiprocessor then has less to do; backward
  ones are narrow, since of wide ones only two fit on a multiprocessor.
  """
  if tiles.slab_rows(size) > 32:
    return Config(
      ForwardConfig(channels=64, tile=16),
      BackwardConfig(channels=64, unroll=4, flush=4),
    )
  busiest = lambda width: -(-batch * channels // (width * processors))
  divides = channels // groups % 64 == 0
  if divides and 1.9 * busiest(64) < busiest(32):
    return Config(forward=ForwardConfig(channels=64, tile=16, unroll=16))
  return Config()


def selective_scan(
  x,
  dt,
  A,
  B,
  C,
  D,
  z,
  dt_bias,
  initial_state,
  marks,
  *,
  dt_softplus,
  config=None,
):
  """Implements `selective_scan` on Hopper; see `ops.selective_scan.api.apply`.

  `config` is by default that of `choose_config`. Where channels and states do
  not fill the kernels' blocks, zeros stand beside them, which costs a copy.

  Returns:
    y (B, L, D) in x's dtype and the state (B, D, N), float32. Exponentials are
    the hardware's, good to 2e-7, and products run in float32. Backward, dB and
    dC take (D / channels, B, L, N) float32 each until summed over blocks.
  """
  given = {
    "x": x,
    "dt": dt,
    "A": A,
    "B": B,
    "C": C,
    "z": z,
    "D": D,
    "dt_bias": dt_bias,
    "state": initial_state,
  }
  given = {name: a for name, a in given.items() if a is not None}
  groups, size = B.shape[2:]
  per_group = x.shape[-1] // groups
  more_states = min(n for n in SIZES if n >= size) - size
  block = max(32, tiles.slab_rows(size + more_states))
  more_channels = -per_group % block
  if more_channels or more_states:
    given = _fill(given, groups, more_channels, more_states)
  config = config or choose_config(
    x.shape[0], groups * (per_group + more_channels), groups, size + more_states
  )
  y, state = _scan(_Options(dt_softplus, config), given, marks)
  if more_channels:
    y = _by_group(y, 2, groups)[..., :per_group].reshape(x.shape)
    state = _by_group(state, 1, groups)[:, :, :per_group]
    state = state.reshape(x.shape[0], x.shape[-1], -1)
  return y, state[..., :size]


# Of each operand the axes of channels and of states.
_AXES = {
  "x": (2, None),
  "dt": (2, None),
  "A": (0, 1),
  "B": (None, 3),
  "C": (None, 3),
  "z": (2, None),
  "D": (0, None),
  "dt_bias": (0, None),
  "state": (1, 2),
}


def _fill(given, groups, more_channels, more_states):
  """Appends zeros to the channels of each group, and to the states."""

  def one(name, array):
    channel_axis, state_axis = _AXES[name]
    if state_axis is not None and more_states:
      array = _append(array, state_axis, more_states)
    if channel_axis is not None and more_channels:
      shape = list(array.shape)
      shape[channel_axis] += groups * more_channels
      array = _by_group(array, channel_axis, groups)
      array = _append(array, channel_axis + 1, more_channels).reshape(shape)
    return array

  return {name: one(name, array) for name, array in given.items()}


def _by_group(array, axis, groups):
  shape = array.shape
  return array.reshape(*shape[:axis], groups, -1, *shape[axis + 1 :])


def _append(array, axis, count):
  padding = [(0, 0)] * array.ndim
  padding[axis] = (0, count)
  return jnp.pad(array, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, given, marks):
  y, final = _run_forward(options, given, marks, None)
  return y[:, : given["x"].shape[1]], final


def _scan_forward(options, given, marks):
  every = options.config.backward.tile
  y, final, states = _run_forward(options, given, marks, every)
  return (y[:, : given["x"].shape[1]], final), (given, marks, states)


# Compiled by themselves, so that many layers lower their kernels once.
@functools.partial(jax.jit, static_argnums=(0, 3))
def _run_forward(options, given, marks, save_every):
  return forward(
    _operands(options.config, given, marks),
    config=options.config.forward,
    dt_softplus=options.dt_softplus,
    save_every=save_every,
  )


@functools.partial(jax.jit, static_argnums=0)
def _scan_backward(options, residuals, cotangents):
  given, marks, states = residuals
  dy, dfinal = cotangents
  operands = _operands(options.config, given, marks)
  operands.pop("state", None)
  operands["dy"] = _pad(dy, operands["x"].shape[1])
  operands["dfinal"] = dfinal.astype(jnp.float32)
  operands["states"] = states
  found = backward(
    operands,
    config=options.config.backward,
    dt_softplus=options.dt_softplus,
  )
  groups = given["B"].shape[2]
  gradients = {}
  for name, like in given.items():
    value = found["d" + name]
    if name in ("B", "C"):
      value = value.reshape(groups, -1, *value.shape[1:])
      value = jnp.moveaxis(jnp.sum(value, axis=1), 0, 2)
    elif name in ("A", "D", "dt_bias"):
      value = jnp.sum(value, axis=0)
    if name in ("x", "dt", "B", "C", "z"):
      value = value[:, : like.shape[1]]
    gradients[name] = value.astype(like.dtype)
  return gradients, None


_scan.defvjp(_scan_forward, _scan_backward)


def _operands(config, given, marks):
  """Returns the kernels' operands, L filled up with padding to whole tiles."""
  batch, length = given["x"].shape[:2]
  tile = math.lcm(config.forward.tile, config.backward.tile)
  whole = -(-length // tile) * tile
  if marks is None and whole > length:
    marks = jnp.zeros((batch, length), jnp.int32)
  operands = dict(given)
  for name in ("x", "dt", "B", "C", "z"):
    if name in given:
      operands[name] = _pad(given[name], whole)
  for name in ("A", "D", "dt_bias", "state"):
    if name in given:
      operands[name] = given[name].astype(jnp.float32)
  operands["A"] = operands["A"] * tiles.LOG2E
  if marks is not None:
    marks = _pad(marks, whole, PADDING)
    exponents = jnp.where(marks == RESET, tiles.RESET_EXPONENT, 0.0)
    live = jnp.where(marks == PADDING, 0.0, 1.0)
    operands["marks"] = jnp.stack([exponents, live], axis=1)
  return operands


def _pad(array, length, fill=0):
  padding = [(0, 0)] * array.ndim
  padding[1] = (0, length - array.shape[1])
  return jnp.pad(array, padding, constant_values=fill)
