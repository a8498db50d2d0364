"""`rms_norm` as GPU kernels: one pass over memory each way.

The forward kernel is here, the backward one in `mosaic_gpu_backward`, and
`mosaic_gpu_walk` says how both go over the rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ops import dispatch
from ops.causal_conv1d.mosaic_gpu_walk import sigmoid
from ops.hopper import PROCESSORS
from ops.rms_norm.mosaic_gpu_backward import backward
from ops.rms_norm.mosaic_gpu_walk import LINES, Walk

NAME = "rms_norm_fwd"
_LANES, _WIDEST = 32, 8192


@dataclasses.dataclass(frozen=True)
class Config:
  """How both kernels are cut."""

  forward: Walk
  backward: Walk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
  """What is known of a call before its arrays.

  Attributes:
    num_groups: G.
    eps: Added to the mean of the squares.
    dtypes: Of x and of the result.
    config: How the kernels are cut; None for `configure`.
    interpret: Of `plgpu.kernel`.
  """

  num_groups: int
  eps: float
  dtypes: tuple[jnp.dtype, jnp.dtype]
  config: Config | None = None
  interpret: Any = False

  def cut(self, shape: tuple[int, int]) -> Config:
    """Returns the Config for arrays (T, C)."""
    rows, channels = shape
    return self.config or configure(
      rows, channels // self.num_groups, self.num_groups
    )


def configure(rows: int, channels: int, groups: int = 1) -> Config:
  """Returns the Config for shapes; pure.

  Args:
    rows: T.
    channels: C / G.
    groups: G.
  """
  split = channels > 1536 or (channels >= 1024 and channels % 512 == 0)
  line = channels // LINES if split else channels
  vector = next(v for v in (4, 2, 1) if line % (_LANES * v) == 0)
  # Channels a thread of each slab.
  share = line // _LANES

  def walk(held, blocks, room):
    slab_rows = 1 if split else LINES
    slabs = max(min(held // share, rows // slab_rows), 1)
    step = slabs * slab_rows
    size = 256
    while size > step and groups * pl.cdiv(rows, size) < blocks:
      size //= 2
    size = max(min(size, rows) // step, 1) * step
    # Whole blocks, where there are any of about this size.
    sizes = range(size, size // 2, -step)
    size = next((size for size in sizes if rows % size == 0), size)
    return Walk(
      channels=channels,
      split=split,
      vector=vector,
      slabs=slabs,
      rows=size,
      ahead=share <= room,
      again=share > 20,
    )

  # At 40 channels a thread loading ahead takes 17% off the forward pass, and
  # doubles the backward one, which holds more (H100).
  return Config(walk(32, 14 * PROCESSORS, 40), walk(16, 7 * PROCESSORS, 20))


def supports(
  x: Any = None,
  scale: Any = None,
  gate: Any = None,
  residual: Any = None,
  **options: Any,
) -> str | None:
  """None where the kernels run, else the reason; see `ops/dispatch.py`."""
  del scale
  reason = dispatch.needs_hopper()
  if reason or x is None:
    return reason
  return unfit(x, gate, residual, **options)


def unfit(
  x: Any,
  gate: Any = None,
  residual: Any = None,
  *,
  num_groups=1,
  dtype=None,
  **_,
) -> str | None:
  """Returns what about shapes and dtypes the kernels cannot do, or None."""
  for array in (x, gate, residual):
    given = x.dtype if array is None else array.dtype
    if given not in (jnp.bfloat16, jnp.float32):
      return f"needs arrays in bfloat16 or float32, not {given}"
  if jnp.dtype(dtype or x.dtype) not in (jnp.bfloat16, jnp.float32):
    return f"gives bfloat16 or float32, not {dtype}"
  channels = x.shape[-1] // num_groups
  if not channels or channels % 128 or channels > _WIDEST:
    return f"needs groups of 128, 256, ..., {_WIDEST} channels, not {channels}"
  if x.size < LINES * x.shape[-1]:
    return f"needs at least {LINES} rows, x is {x.shape}"
  return None


def forward(
  x: jax.Array,
  scale: jax.Array,
  gate: jax.Array | None,
  residual: jax.Array | None,
  *,
  num_groups: int,
  eps: float,
  dtype: jnp.dtype,
  config: Config | None = None,
  interpret: Any = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Implements `rms_norm`; arguments as in `ops.rms_norm.api`.

  Exponentials and roots are the hardware's, good to 2e-7. `config` is by
  default that of `configure`, `interpret` is that of `plgpu.kernel`.
  """
  norm = Norm(
    num_groups=num_groups,
    eps=float(eps),
    dtypes=(jnp.dtype(x.dtype), jnp.dtype(dtype)),
    config=config,
    interpret=interpret,
  )
  flat = [
    None if array is None else array.reshape(-1, x.shape[-1])
    for array in (x, gate, residual)
  ]
  results = _norm(norm, flat[0], scale, *flat[1:])
  return jax.tree.map(lambda y: y.reshape(x.shape), results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(norm, x, scale, gate, residual):
  return _forward(norm, x, scale, gate, residual)[0]


def _forward(norm, x, scale, gate, residual):
  operands = {"x": x, "gate": gate, "residual": residual}
  operands = {k: v for k, v in operands.items() if v is not None}
  results = launch(norm, operands, scale)
  if residual is None:
    return results[0], (x, scale, gate)
  return tuple(results), (results[1], scale, None)


def _backward(norm, kept, cotangents):
  v, scale, gate = kept
  is_sum = isinstance(cotangents, tuple)
  dh, dv = cotangents if is_sum else (cotangents, None)
  operands = {"x": v, "gate": gate, "dh": dh, "dv": dv}
  operands = {k: a for k, a in operands.items() if a is not None}
  grads, dscale = backward(norm, operands, scale, norm.cut(v.shape).backward)
  dx, dresidual = grads["x"], None
  if is_sum:
    dresidual, dx = dx, grads.get("narrow", dx)
  return dx, dscale, grads.get("gate"), dresidual


_norm.defvjp(_forward, _backward)


# Compiled by itself, so that many layers lower their kernels once.
@functools.partial(jax.jit, static_argnums=0)
def launch(
  norm: Norm, operands: dict[str, jax.Array], scale
) -> list[jax.Array]:
  """Runs the forward kernel.

  Args:
    norm: What is known before.
    operands: (T, C) arrays x, and perhaps gate or residual.
    scale: (C,).

  Returns:
    h, and the sum with a residual, (T, C).
  """
  x, groups = operands["x"], norm.num_groups
  x_dtype, dtype = norm.dtypes
  is_plain = len(operands) == 1
  walk = norm.cut(x.shape).forward
  names = tuple(operands)
  if is_plain:
    scale = scale.astype(x_dtype)

  def value(piece):
    v = piece["x"].astype(jnp.float32)
    if "gate" in piece:
      z = piece["gate"].astype(jnp.float32)
      v = v * (z * sigmoid(z))
    return v + piece["residual"] if "residual" in piece else v

  def body(*refs, sums_):
    inputs, (scale_ref, *results) = refs[: len(names)], refs[len(names) :]
    scale = walk.scales(scale_ref)

    def step(index, row, slabs, carry):
      values = [[value(p) for p in walk.pieces(slab)] for slab in slabs]
      squares = [[[v * v for v in slab]] for slab in values]
      totals = walk.row_sums(index, squares, sums_)
      targets = [walk.slabs_of(ref, row) for ref in results]
      for k, (slab, (total,)) in enumerate(zip(slabs, totals, strict=True)):
        root = lax.rsqrt(total * (1.0 / walk.channels) + norm.eps)
        root = walk.over_row(root)
        pieces = walk.pieces(slab, again=True)
        for i, piece in enumerate(pieces):
          v = value(piece) if walk.again else values[k][i]
          h = v * root
          if is_plain:
            h = h.astype(x_dtype).astype(jnp.float32)
            h = (h * scale(i)).astype(x_dtype)
          else:
            h = h * scale(i)
          walk.store(targets[0][k], i, h)
          if "residual" in names:
            walk.store(targets[1][k], i, v)
      return carry

    references = dict(zip(names, inputs, strict=True))
    walk.run(walk.first(x.shape[0]), references, step, ())

  views = [walk.view(array, groups) for array in operands.values()]
  outs = [dtype] if "residual" not in names else [dtype, jnp.float32]
  kernel = walk.kernel(
    body,
    x.shape[0],
    groups,
    1,
    NAME,
    out_type=[jax.ShapeDtypeStruct(views[0].shape, out) for out in outs],
    interpret=norm.interpret,
  )
  found = kernel(*views, walk.view(scale.astype(jnp.float32), groups))
  return [array.reshape(x.shape) for array in found]
