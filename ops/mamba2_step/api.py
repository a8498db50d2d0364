"""`mamba2_step`: its weights, checks and choice of the implementation."""

import dataclasses
import importlib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.quantized import QState, QTensor, QWeight, Taps

IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.on_one_device(
      dispatch.kernel("ops.mamba2_step.mosaic_gpu", dispatch.needs_hopper)
    ),
    "xla": dispatch.always,
  }
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Weights:
  """The weights of L layers, stacked; E = H P, C = E + 2 G N, F = E + C + H.

  Attributes:
    norm: (L, D), scale of the norm in front of the layer.
    in_proj: (L, D, F), an array, a `QTensor` of axis -2 or a `QWeight`: to z,
      the input of the convolution (x, B, C) and dt.
    conv_weight: (L, C, K), the tap of the current token last.
    conv_bias: (L, C).
    dt_bias: (L, H).
    A_log: (L, H), the logarithm of -A.
    D: (L, H), skip.
    gated_norm: (L, E), scale of the norm in front of `out_proj`.
    out_proj: (L, E, D), as in_proj.
    taps: Quantizers of what no product reads.
  """

  norm: jax.Array
  in_proj: jax.Array | QTensor | QWeight
  conv_weight: jax.Array | QTensor
  conv_bias: jax.Array
  dt_bias: jax.Array
  A_log: jax.Array
  D: jax.Array
  gated_norm: jax.Array
  out_proj: jax.Array | QTensor | QWeight
  taps: Taps = Taps()


def mamba2_step(
  x: jax.Array,
  weights: Mamba2Weights,
  conv_state: jax.Array | QState,
  ssm_state: jax.Array | QState,
  *,
  eps: float,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | QState, jax.Array | QState]:
  """Takes one token of each row through a stack of Mamba-2 layers.

  Mamba-2 (https://arxiv.org/abs/2405.21060, section 7), for each layer:

    z, c, dt = in_proj(rmsnorm(x));  s, B, C = silu(conv(c, conv_state))
    h = exp(dt A) h + dt s B^T;      y = h C + D s    dt after bias and softplus
    x = x + out_proj(rmsnorm(y * silu(z)))

  The gated norm has one mean a group. The equivalent plain JAX is a `lax.scan`
  over layers of `causal_conv1d_step`, `ssd_step` and two products.

  Args:
    x: Residual stream, (B, D), summed in float32.
    weights: Of L layers, bfloat16 or float32. Products take their operands in
      the dtype of `conv_state` and sum in float32; norms, decays and the state
      are float32.
    conv_state: The last K-1 inputs of the convolution, oldest first,
      (L, B, K-1, C), bfloat16 or float32, or a `QState` that stands for such.
    ssm_state: (L, B, H, P, N) float32, or a `QState` that stands for it.
    eps: Of both norms.
    implementation: `"xla"`, `"mosaic_gpu"`, or None for the best that runs
      here.

  Returns:
    x, (B, D) float32, and the new states, written in the place of the old ones
    where the caller donates these. Memory beyond them is of the order of B F.
    Only `"xla"` has gradients.

  Raises:
    ValueError: Shapes do not fit each other, or `implementation` does not run.
  """
  check(x, weights, conv_state, ssm_state)
  arrays = (x, weights, conv_state, ssm_state)
  name = resolve(*arrays, implementation=implementation)
  module = importlib.import_module(f"ops.mamba2_step.{name}")
  return module.forward(*arrays, eps=eps)


def resolve(*arrays, implementation: str | None = None) -> str:
  """Returns the name of the implementation that these arrays get."""
  return dispatch.resolve(
    "mamba2_step", IMPLEMENTATIONS, implementation, *arrays
  )


def check(x, weights, conv_state, ssm_state) -> None:
  """Raises ValueError unless all shapes fit each other."""
  if x.ndim != 2 or conv_state.ndim != 4 or ssm_state.ndim != 5:
    raise ValueError(
      f"mamba2_step: x {x.shape}, conv_state {conv_state.shape} and ssm_state"
      f" {ssm_state.shape} are not (B, D), (L, B, K-1, C) and (L, B, H, P, N)"
    )
  b, d = x.shape
  layers, _, taps, c = conv_state.shape
  h, p, n = ssm_state.shape[2:]
  e = h * p
  if c <= e or (c - e) % (2 * n) or h % ((c - e) // (2 * n)):
    raise ValueError(
      f"mamba2_step: {c} channels of conv_state are not {e} and B and C of"
      f" groups of {h} heads with {n} states"
    )
  if conv_state.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f"mamba2_step: conv_state is {conv_state.dtype}, not bfloat16 or float32"
    )
  wanted = {
    "norm": (d,),
    "in_proj": (d, e + c + h),
    "conv_weight": (c, taps + 1),
    "conv_bias": (c,),
    "dt_bias": (h,),
    "A_log": (h,),
    "D": (h,),
    "gated_norm": (e,),
    "out_proj": (e, d),
  }
  found = {name: getattr(weights, name).shape for name in wanted}
  wanted = {name: (layers, *shape) for name, shape in wanted.items()}
  found |= {"conv_state": conv_state.shape, "ssm_state": ssm_state.shape}
  wanted |= {
    "conv_state": (layers, b, taps, c),
    "ssm_state": (layers, b, h, p, n),
  }
  for name, shape in wanted.items():
    if found[name] != shape:
      raise ValueError(
        f"mamba2_step: {name} is {found[name]}, but x {x.shape} and the states"
        f" need {shape}"
      )
