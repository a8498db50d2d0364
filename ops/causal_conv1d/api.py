"""The public depthwise causal convolution: validate, resolve, call."""

import importlib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from ops import dispatch, segments, sharding
from ops.quantized import QState, QTensor, as_array

# The kernel that was measured to be faster (experiments/results) is in front of
# "xla", the other stands behind it.
IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.kernel(
      "ops.causal_conv1d.mosaic_gpu", dispatch.needs_hopper
    ),
    "xla": dispatch.always,
    "mosaic_tpu": dispatch.kernel(
      "ops.causal_conv1d.mosaic_tpu", dispatch.needs_tpu
    ),
  }
)


def causal_conv1d(
  x: jax.Array | QTensor,
  weight: jax.Array | QTensor,
  bias: jax.Array | QTensor | None = None,
  *,
  activation: str | None = None,
  initial_state: jax.Array | QState | None = None,
  return_final_state: bool = False,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Convolves each channel with its own K taps, seeing no later token.

  The short convolution of Mamba (https://arxiv.org/abs/2312.00752, figure 3):

    y_t = act(bias + sum_{k<K} weight[:, K-1-k] * x_{t-k})

  where x_{-1}, x_{-2}, ... are the initial state, newest last, or zero. A tap
  on another segment or on padding is zero.

  Without state and segments it is
  `jax.lax.conv_general_dilated(x, weight.T[:, None], (1,), [(K-1, 0)],
  dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=D) + bias`,
  then `jax.nn.silu`.

  Args:
    x: (B, L, D), bfloat16 or float32; sums and SiLU are float32. A QTensor, as
      of weight and bias, is first dequantized to the dtype that it stands for.
    weight: (D, K), the tap of the current token last.
    bias: (D,), or None.
    activation: "silu", or None.
    initial_state: The K-1 inputs before the row's first token, oldest first,
      (B, K-1, D); rounded to x's dtype. It belongs to the first segment.
    return_final_state: Also return the state after the last token.
    segment_ids: (B, L) int32, see `ops/segments.py`: negative is padding, whose
      output is zero. Padding inside a segment is not supported: there its taps
      count as zero instead of being skipped.
    implementation: `"xla"`, `"mosaic_gpu"`, `"mosaic_tpu"`, or None for the
      best that runs here.

  Returns:
    (B, L, D) in x's dtype; with `return_final_state`, also the last K-1 inputs
    of the last segment, (B, K-1, D) in x's dtype. Gradients of x, weight, bias
    and initial_state; the backward keeps the inputs alone.

  Raises:
    ValueError: shapes, activation or ids do not fit.
  """
  x, weight, bias = (as_array(v) for v in (x, weight, bias))
  initial_state = as_array(initial_state)
  check("causal_conv1d", x, weight, bias, initial_state, activation)
  segments.check("causal_conv1d", segment_ids, *x.shape[:2])
  if sharding.sizes():
    sharded = importlib.import_module("ops.causal_conv1d.sharded")
    return sharded.causal_conv1d(
      causal_conv1d,
      {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state,
       "segment_ids": segment_ids},
      activation=activation,
      return_final_state=return_final_state,
      implementation=implementation,
    )  # fmt: skip
  name = dispatch.resolve(
    "causal_conv1d", IMPLEMENTATIONS, implementation, x, weight
  )
  state, reach = initial_state, None
  if state is not None:
    state = state.astype(x.dtype)
  if segment_ids is not None:
    x, state, reach = _place(x, state, segment_ids, weight.shape[1] - 1)
  module = importlib.import_module(f"ops.causal_conv1d.{name}")
  y = module.convolve(x, weight, bias, state, reach, activation == "silu")
  if not return_final_state:
    return y
  return y, _final_state(x, state, reach, weight.shape[1] - 1)


def check(op, x, weight, bias, state, activation) -> None:
  """Raises ValueError in the name of `op` unless the arguments fit."""
  if x.ndim != 3:
    raise ValueError(f"{op}: x is {x.shape}, not (B, L, D)")
  batch, length, channels = x.shape
  if length < 1:
    raise ValueError(f"{op}: x is {x.shape}: it has no token")
  if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
    raise ValueError(f"{op}: weight is {weight.shape}, not ({channels}, K)")
  if bias is not None and bias.shape != (channels,):
    raise ValueError(f"{op}: bias is {bias.shape}, not {(channels,)}")
  wanted = (batch, weight.shape[1] - 1, channels)
  if state is not None and state.shape != wanted:
    raise ValueError(f"{op}: the state is {state.shape}, not {wanted}")
  if activation not in (None, "silu"):
    raise ValueError(f"{op}: activation is {activation!r}, not None or 'silu'")


def _place(x, state, segment_ids, taps):
  """Puts the state in front of the first token that is not padding.

  Returns x and the state, and how many taps back each token sees, (B, L)
  int32, -1 for padding.
  """
  x = segments.zero_padding(x, segment_ids)
  padding = segments.is_padding(segment_ids)
  slots = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
  resets = segments.resets(segment_ids)
  starts = lax.cummax(jnp.where(resets, slots, -taps), axis=1)
  reach = jnp.where(padding, -1, jnp.minimum(slots - starts, taps))
  if state is not None:
    first = jnp.argmax(~padding, axis=1)
    joined = jnp.concatenate([jnp.zeros_like(state), x], axis=1)
    joined = jax.vmap(
      lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new, at, 0)
    )(joined, state, first)
    state, x = joined[:, :taps], joined[:, taps:]
  return x, state, reach


def _final_state(x, state, reach, taps):
  """The inputs that the token after the last one would see."""
  batch, length, channels = x.shape
  if state is None:
    state = jnp.zeros((batch, taps, channels), x.dtype)
  if reach is None:
    joined = jnp.concatenate([state, x[:, max(length - taps, 0) :]], axis=1)
    return joined[:, joined.shape[1] - taps :]
  slots = jnp.arange(length, dtype=jnp.int32)[None, :]
  last = jnp.max(jnp.where(reach < 0, -1, slots), axis=1, keepdims=True)
  ago = jnp.arange(taps, dtype=jnp.int32)[::-1][None, :]
  wanted = last - ago
  take = lambda array, at: jnp.take_along_axis(
    array, jnp.maximum(at, 0)[..., None], axis=1, mode="clip"
  )
  found = take(x, wanted)
  found = jnp.where(wanted[..., None] < 0, take(state, wanted + taps), found)
  seen = jnp.take_along_axis(reach, jnp.maximum(last, 0), axis=1, mode="clip")
  keep = (ago <= seen) | (last < 0)
  return jnp.where(keep[..., None], found, jnp.zeros((), x.dtype))
