"""The backward GPU kernel of `rms_norm`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ops.causal_conv1d.mosaic_gpu_walk import sigmoid
from ops.rms_norm.mosaic_gpu_walk import Walk

NAME = "rms_norm_bwd"


# Compiled by itself, so that many layers lower their kernels once.
@functools.partial(jax.jit, static_argnums=(0, 3))
def backward(
  norm: Any, operands: dict[str, jax.Array], scale: jax.Array, walk: Walk
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Runs the kernel.

  With v the normed value, r the inverse of its root mean square and g the
  gradient dh * scale of v * r,

    dv = r g - r^3 mean(g v) v          dscale = sum over rows of dh v r

  Both sums over a row, of v^2 and of g v, are found in one pass.

  Args:
    norm: A `mosaic_gpu.Norm`.
    operands: (T, C) arrays: x, or the sum with the residual; dh; and perhaps
      gate, or dv, the gradient of that sum itself.
    scale: (C,).
    walk: How to cut the problem.

  Returns:
    By name x's gradient, or that of the sum, the gate's, and "narrow", that of
    the sum in the dtype of what was added, if this is another; and scale's.
  """
  x, groups = operands["x"], norm.num_groups
  rows, names = x.shape[0], tuple(operands)
  outs = {"x": x.dtype}
  if "gate" in operands:
    outs["gate"] = operands["gate"].dtype
  if "dv" in operands and norm.dtypes[0] != x.dtype:
    outs["narrow"] = norm.dtypes[0]
  # Then the last block begins inside of the one before.
  overlaps = rows % walk.rows > 0
  mean = 1.0 / walk.channels

  def value(piece):
    """Returns v, and for a gated norm x, z and sigmoid(z)."""
    v = piece["x"].astype(jnp.float32)
    if "gate" not in piece:
      return v, None
    z = piece["gate"].astype(jnp.float32)
    gate = sigmoid(z)
    return v * (z * gate), (v, z, gate)

  def gradients(piece, dv, gated):
    """Returns the gradients of a piece of the inputs by that of v."""
    if gated is not None:
      x, z, gate = gated
      slope = gate * (1.0 + z * (1.0 - gate))
      return {"x": dv * (z * gate), "gate": dv * (x * slope)}
    total = dv + piece["dv"] if "dv" in piece else dv
    return dict.fromkeys(outs, total)

  def body(*refs, sums_):
    inputs, (scale_ref, *results) = refs[: len(names)], refs[len(names) :]
    *results, dscale_ref = results
    scale = walk.scales(scale_ref)

    def step(index, row, slabs, dscale):
      values, parts = [], []
      for slab in slabs:
        pieces = walk.pieces(slab)
        found = [value(piece) for piece in pieces]
        grads = [
          piece["dh"].astype(jnp.float32) * scale(i)
          for i, piece in enumerate(pieces)
        ]
        values.append(found)
        parts.append(
          [
            [v * v for v, _ in found],
            [g * v for g, (v, _) in zip(grads, found, strict=True)],
          ]
        )
      sums = walk.row_sums(index, parts, sums_)
      targets = {
        name: walk.slabs_of(ref, row)
        for name, ref in zip(outs, results, strict=True)
      }
      for k, (slab, (squares, products)) in enumerate(
        zip(slabs, sums, strict=True)
      ):
        root = lax.rsqrt(squares * mean + norm.eps)
        along = root * root * root * (products * mean)
        counted = root
        if overlaps:
          least = lax.axis_index("segment") * walk.rows
          counted = jnp.where(walk.since(row, k, least), root, 0.0)
        root, along, counted = map(walk.over_row, (root, along, counted))
        for i, piece in enumerate(walk.pieces(slab, again=True)):
          v, gated = value(piece) if walk.again else values[k][i]
          dh = piece["dh"].astype(jnp.float32)
          dscale[i] = dscale[i] + dh * v * counted
          dv = dh * scale(i) * root - v * along
          for name, gradient in gradients(piece, dv, gated).items():
            walk.store(targets[name][k], i, gradient)
      return dscale

    references = dict(zip(names, inputs, strict=True))
    sums = walk.run(walk.first(rows), references, step, walk.zeros())
    walk.store_sums(dscale_ref, sums)

  views = [walk.view(array, groups) for array in operands.values()]
  kernel = walk.kernel(
    body,
    rows,
    groups,
    2,
    NAME,
    out_type=[
      *(jax.ShapeDtypeStruct(views[0].shape, out) for out in outs.values()),
      walk.sums_type(rows, groups),
    ],
    interpret=norm.interpret,
  )
  *found, sums = kernel(*views, walk.view(scale.astype(jnp.float32), groups))
  found = {
    name: array.reshape(x.shape)
    for name, array in zip(outs, found, strict=True)
  }
  dscale = jnp.sum(sums, axis=(0, 1)).reshape(scale.shape)
  return found, dscale.astype(scale.dtype)
