"""The products of a layer where its weights are of few bits."""

import dataclasses

import jax.numpy as jnp

from ops.hopper import PROCESSORS, SHARED_MEMORY
from ops.hopper_tiles import TILE
from ops.mamba2_step.mosaic_gpu import of_weight
from ops.quantized import QTensor, QWeight
from ops.quantized_matmul import mosaic_gpu as few_rows
from ops.quantized_matmul import mosaic_gpu_product as few_bits

# Matrices of each product: a thread block has columns of one of them, or as
# many of each.
MATRICES = {
  "qkv": ("q_proj", "k_proj", "v_proj"),
  "o": ("o_proj",),
  "gate_up": ("gate_proj", "up_proj"),
  "down": ("down_proj",),
}


def matrices(weights, name: str) -> list:
  """Those of a product, arrays or QTensors, without a QWeight around them."""
  return [of_weight(getattr(weights, one)) for one in MATRICES[name]]


def unfit(weights) -> str | None:
  """Returns None if the kernels take these matrices, else why not."""
  for name, parts in MATRICES.items():
    forms = []
    for part, w in zip(parts, matrices(weights, name)):
      if isinstance(w, QWeight):
        return f"needs activations that are not quantized, {part} does it"
      if isinstance(w, QTensor):
        if reason := few_rows.unfit_weight(w):
          return f"{reason} ({part})"
        forms.append((w.format, w.num_blocks))
      elif w.dtype != jnp.bfloat16:
        return f"needs bfloat16, {part} is {w.dtype}"
      else:
        forms.append(None)
    if any(form != forms[0] for form in forms):
      return f"needs {' and '.join(parts)} in one format"
  return None


def configure(config, rows: int, size: int, weights):
  """Returns a Config for weights of which some are of few bits.

  Args:
    config: Of `mosaic_gpu.configure`.
    rows: N.
    size: K.
    weights: `TransformerWeights`.
  """
  changes = {}
  for name, columns in columns_of(size).items():
    parts = matrices(weights, name)
    w = parts[0]
    if not isinstance(w, QTensor):
      continue
    depth, groups = w.shape[-2], w.num_blocks
    chunks = depth // few_bits.chunk_of(depth, groups)
    whole = groups if groups > 1 else chunks
    splits = getattr(config, f"{name}_splits")
    splits = max(n for n in range(1, splits + 1) if whole % n == 0)
    blocks = splits * sum(one.shape[-1] for one in parts) // columns
    alone = splits <= 2 and blocks <= PROCESSORS
    free = SHARED_MEMORY if alone else SHARED_MEMORY // 2 - 1024
    # Beside the rings lie scales, what other blocks found, and new keys.
    free -= 4096 + 4 * columns * (groups // splits + 4)
    free -= (4 * (splits - 1) + 2) * rows * columns
    warpgroups, stages = few_bits.rings(
      free, rows=rows, depth=depth, columns=columns, groups=groups,
      bits=w.format.bits, splits=splits,
    )  # fmt: skip
    changes |= {
      f"{name}_splits": splits,
      f"{name}_stages": stages,
      f"{name}_warpgroups": warpgroups,
    }
  # Only weights in bfloat16 are brought to the cache.
  return dataclasses.replace(config, **changes, ahead=0) if changes else config


def columns_of(size: int) -> dict[str, int]:
  """Columns of a thread block of each product, by K."""
  return {"qkv": size, "o": TILE, "gate_up": 2 * TILE, "down": TILE}


def product(config, name: str, rows: int, size: int, parts: list, interpret):
  """Returns the product of matrices, and the operands of each of them.

  Args:
    config: A Config.
    name: Of the product.
    rows: N.
    size: K.
    parts: QTensors of one format, (L, D, F).
    interpret: Whether it is interpreted.
  """
  w, columns = parts[0], columns_of(size)[name]
  groups = w.num_blocks
  found = few_bits.Product(
    rows=rows,
    depth=w.shape[-2],
    groups=groups,
    packed=w.format.packed,
    warpgroups=getattr(config, f"{name}_warpgroups"),
    stages=getattr(config, f"{name}_stages"),
    splits=getattr(config, f"{name}_splits"),
    tiles=columns // TILE,
    by_tiles=len(parts) > 1,
    interpret=bool(interpret),
  )
  operands = []
  for one in parts:
    scales = jnp.broadcast_to(one.scales, (*one.values.shape[:-1], groups))
    operands.append(found.operands(one.values, scales, one.shape[-1]))
  if groups == 1 and len(parts) > 1:
    # Those of the columns of a thread block lie side by side.
    scales = [values.pop() for values in operands]
    if name == "gate_up":
      scales = [one.reshape(len(one), -1, TILE) for one in scales]
    scales = jnp.concatenate(scales, axis=-1)
    operands[0].append(scales.reshape(len(scales), -1))
  return found, operands
