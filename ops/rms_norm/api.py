"""`rms_norm`: checks and choice of the implementation."""

import functools
import importlib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ops import dispatch, sharding
from ops.quantized import QTensor, as_array

IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.kernel(
      "ops.rms_norm.mosaic_gpu", dispatch.needs_hopper
    ),
    "xla": dispatch.always,
  }
)


def rms_norm(
  x: jax.Array | QTensor,
  scale: jax.Array,
  *,
  gate: jax.Array | QTensor | None = None,
  residual: jax.Array | None = None,
  num_groups: int = 1,
  eps: float,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Divides each row by its root mean square, and scales its channels.

    h = v / sqrt(mean(v^2) + eps) * scale

  The norm of Zhang and Sennrich (https://arxiv.org/abs/1910.07467, eq. 4), of

    v = x                plain
    v = x * silu(gate)   gated, as in Mamba-2 (https://arxiv.org/abs/2405.21060)
    v = residual + x     the sum and norm of a pre-norm block; v is returned too

  with means over each of `num_groups` groups of neighbouring channels. The
  backward pass keeps x and gate, or v. For one group it is

    v * jax.lax.rsqrt(jnp.mean(v * v, -1, keepdims=True) + eps) * scale

  Args:
    x: (..., C), bfloat16 or float32. A QTensor, as of gate, is first
      dequantized to the dtype that it stands for.
    scale: (C,), of any float dtype. A plain norm is rounded to x's dtype before
      scale is, and after; the others are rounded once.
    gate: (..., C), bfloat16 or float32, or None.
    residual: (..., C) float32, or None.
    num_groups: Divides C.
    eps: Added to the mean, a Python number.
    dtype: Of h; by default x's. Means are in float32.
    implementation: `"xla"`, `"mosaic_gpu"` (Hopper; C / num_groups a multiple
      of 128), or None for the best that runs here.

  Returns:
    h (..., C); with `residual` (h, v), v in float32. Gradients have the dtypes
    of their arrays, that of scale is summed in float32 by the kernels, in the
    dtype of x by XLA.

  Raises:
    ValueError: shapes, dtypes or groups do not fit.
  """
  x, gate = as_array(x), as_array(gate)
  _check(x, scale, gate, residual, num_groups)
  options = {
    "num_groups": num_groups,
    "eps": eps,
    "dtype": jnp.dtype(dtype or x.dtype),
  }
  arrays = x, scale, gate, residual
  cut = sharding.sizes()
  if implementation is None and sharding.TENSOR in cut:
    # The compiler finds the mean of channels that lie on several devices.
    return importlib.import_module("ops.rms_norm.xla").forward(
      *arrays, **options
    )
  if cut and x.ndim > 1:
    options |= {"implementation": implementation}
    return _over_devices(functools.partial(rms_norm, **options), *arrays)
  name = dispatch.resolve(
    "rms_norm", IMPLEMENTATIONS, implementation, *arrays, **options
  )
  implementing = importlib.import_module(f"ops.rms_norm.{name}")
  return implementing.forward(*arrays, **options)


def _over_devices(op, x, scale, gate, residual):
  middle = ("length",) if x.ndim == 3 else (None,) * (x.ndim - 2)
  rows = ("batch", *middle, None)
  return sharding.over_devices(
    lambda *, x, scale, gate, residual: op(
      x, scale, gate=gate, residual=residual
    ),
    {"x": x, "scale": scale, "gate": gate, "residual": residual},
    {"x": rows, "scale": (None,), "gate": rows, "residual": rows},
    rows if residual is None else (rows, rows),
  )


def _check(x, scale, gate, residual, num_groups):
  op = "rms_norm"
  if x.ndim < 1 or scale.shape != x.shape[-1:]:
    raise ValueError(
      f"{op}: x {x.shape} and scale {scale.shape} are not (..., C) and (C,)"
    )
  if gate is not None and residual is not None:
    raise ValueError(f"{op}: takes a gate or a residual, not both")
  for name, array in (("gate", gate), ("residual", residual)):
    if array is not None and array.shape != x.shape:
      raise ValueError(f"{op}: {name} is {array.shape}, not {x.shape}")
  if residual is not None and residual.dtype != jnp.float32:
    raise ValueError(f"{op}: residual is {residual.dtype}, not float32")
  if num_groups < 1 or x.shape[-1] % num_groups:
    raise ValueError(
      f"{op}: num_groups is {num_groups}, which does not divide {x.shape[-1]}"
    )
