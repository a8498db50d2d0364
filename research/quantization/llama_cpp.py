"""The formats of llama.cpp as baselines: what comes back of weights.

Q8_0 is quantized by the package `gguf`; Q4_K, which that package reads alone,
is quantized here as llama.cpp's reference does, and read by `gguf`. Weights lie
as GGUF has them, (F, D), blocks along D.
"""

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from models import language_model
from models.module import Params
from research.cost import sizes
from research.quantization.recipes import LLAMA_CPP

_BLOCK, _SUPER = 32, 256
# Candidates of a block's scale, as llama.cpp tries them.
_STEPS, _FIRST, _STRIDE = 20, -1.0, 0.1
_Kind = gguf.GGMLQuantizationType


def round_trip(
  config: language_model.Config, params: Params, name: str
) -> tuple[Params, int]:
  """Quantizes kernels and tables, and dequantizes them.

  What Q4_K does not fit, whose blocks have 256 values, gets Q8_0, and so does
  the token table, as llama.cpp gives it more bits.

  Args:
    config: of the model.
    params: of the model, arrays.
    name: of `recipes.LLAMA_CPP`.

  Returns:
    Parameters as arrays, and the bytes of all weights in the format.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(params)
  small = name == LLAMA_CPP[1]
  pairs = [_pack(keys[-1].key, leaf, small) for keys, leaf in leaves]
  packed, found = map(tree.unflatten, zip(*pairs, strict=True))
  return found, sizes.weight_bytes(config, packed)


def _pack(last: str, leaf: jax.Array, small: bool) -> tuple[Any, jax.Array]:
  """The blocks of a weight as bytes, axes in its order; what comes back."""
  if last not in ("kernel", "table") or leaf.shape[-1] < _BLOCK:
    return leaf, leaf
  turned = lambda x: x if last == "table" else x.swapaxes(-1, -2)
  rows = turned(np.asarray(leaf, np.float32))
  if rows.shape[-1] % _BLOCK:
    return leaf, leaf
  kind = _Kind.Q8_0
  if small and last == "kernel" and rows.shape[-1] % _SUPER == 0:
    kind = _Kind.Q4_K
  flat = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]))
  quantize = quantize_q4_k if kind == _Kind.Q4_K else _quantize_q8_0
  packed = quantize(flat)
  found = gguf.dequantize(packed, kind).reshape(rows.shape)
  packed = packed.reshape(*rows.shape[:-1], -1)
  return turned(packed), jnp.asarray(turned(found), leaf.dtype)


def _quantize_q8_0(rows: np.ndarray) -> np.ndarray:
  return gguf.quantize(rows, _Kind.Q8_0)


def quantize_q4_k(rows: np.ndarray) -> np.ndarray:
  """Packs rows (F, D), D a multiple of 256, into bytes (F, 144 D / 256).

  x ~ d s q - m u in blocks of 32: q of 4 bits, s and u of 6, and d and m of 16
  for 8 blocks, fitted by weighted least squares over some scales.
  """
  blocks = rows.reshape(-1, _SUPER // _BLOCK, _BLOCK).astype(np.float32)
  rms = np.sqrt(np.mean(blocks**2, axis=-1, keepdims=True))
  scales, lows = _fit(blocks, rms + np.abs(blocks))
  d, s = _six_bits(scales)
  m, u = _six_bits(lows)
  steps = (d.astype(np.float32) * s)[..., None]
  ratios = blocks + (m.astype(np.float32) * u)[..., None]
  q = np.rint(ratios / np.where(steps > 0, steps, 1)).clip(0, 15)
  q = np.where(steps > 0, q, 0).astype(np.uint8)
  packed = np.concatenate(
    [
      d.view(np.uint8),
      m.view(np.uint8),
      _pack_scales(s.astype(np.uint8), u.astype(np.uint8)),
      # Two blocks share 32 bytes, the first in the low halves.
      (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(q), -1),
    ],
    axis=1,
  )
  return packed.reshape(len(rows), -1)


def _fit(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Scales and minus the lows, (S, 8), that leave the least weighted error."""
  low, high = np.minimum(x.min(axis=-1), 0), x.max(axis=-1)
  width = np.where(high > low, high - low, 1)
  total, sum_x = weights.sum(axis=-1), (weights * x).sum(axis=-1)

  def error(scale, low, q):
    back = scale[..., None] * q + low[..., None]
    return (weights * (back - x) ** 2).sum(axis=-1)

  def codes(inverse):
    return np.rint(inverse[..., None] * (x - low[..., None])).clip(0, 15)

  scale, best_low = width / 15, low.copy()
  best = error(scale, low, codes(15 / width))
  for step in range(_STEPS + 1):
    q = codes((_FIRST + _STRIDE * step + 15) / width)
    sum_q = (weights * q).sum(axis=-1)
    sum_qq, sum_xq = (weights * q * q).sum(-1), (weights * x * q).sum(-1)
    det = total * sum_qq - sum_q**2
    safe = np.where(det > 0, det, 1)
    new = (total * sum_xq - sum_x * sum_q) / safe
    new_low = (sum_qq * sum_x - sum_q * sum_xq) / safe
    above = new_low > 0
    new = np.where(above, sum_xq / np.maximum(sum_qq, 1e-30), new)
    new_low = np.minimum(new_low, 0)
    found = error(new, new_low, q)
    better = (found < best) & (det > 0)
    scale = np.where(better, new, scale)
    best_low = np.where(better, new_low, best_low)
    best = np.where(better, found, best)
  flat = high <= low
  return np.where(flat, 0, scale), -best_low


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """A float16 (S, 1) for each row of eight, and their shares of it in 63rds."""
  top = values.max(axis=1, keepdims=True)
  shares = np.rint(
    values * np.where(top > 0, 63 / np.where(top > 0, top, 1), 0)
  )
  return (top / 63).astype(np.float16), shares.clip(0, 63)


def _pack_scales(s: np.ndarray, u: np.ndarray) -> np.ndarray:
  """Sixteen numbers of 6 bits in 12 bytes, as GGUF lays them out."""
  first = s[:, :4] | (s[:, 4:] >> 4) << 6
  second = u[:, :4] | (u[:, 4:] >> 4) << 6
  third = (s[:, 4:] & 15) | (u[:, 4:] & 15) << 4
  return np.concatenate([first, second, third], axis=1)
