"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685).

Every matrix of the layers, W (C, D, F) over C stacked layers, becomes
W + alpha / r * A B with A (C, D, r) and B (C, r, F) trained alone. B begins at
zero, so that the adapted model begins as the model.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
_SIDES = ("encoder", "decoder")


def init(params: Params, rank: int, key: jax.Array) -> Params:
  """Adapters of all matrices of encoder and decoder, where there are both.

  Returns:
    A nested dict like `params`, with {"a", "b"} in the place of a matrix.
  """

  def adapter(path, leaf, key):
    layers, width, out = leaf.shape
    a = jax.random.normal(key, (layers, width, rank)) / math.sqrt(width)
    return {
      "a": a.astype(leaf.dtype),
      "b": jnp.zeros((layers, rank, out), leaf.dtype),
    }

  sides = {side: params[side] for side in _SIDES if side in params}
  leaves = jax.tree_util.tree_leaves_with_path(sides)
  chosen = [(path, leaf) for path, leaf in leaves if _is_matrix(path, leaf)]
  found: Params = {}
  for number, (path, leaf) in enumerate(chosen):
    *parents, name = (part.key for part in path)
    place = found
    for parent in parents:
      place = place.setdefault(parent, {})
    place[name] = adapter(path, leaf, jax.random.fold_in(key, number))
  return found


def merge(params: Params, adapters: Params, scale: float) -> Params:
  """The parameters with `scale` * A B added to the matrices of `adapters`."""
  if set(adapters) == {"a", "b"}:
    a, b = adapters["a"], adapters["b"]
    change = jnp.einsum(
      "cdr,crf->cdf", a, b, preferred_element_type=jnp.float32
    )
    return (params + (scale * change).astype(params.dtype)).astype(params.dtype)
  return {
    name: merge(part, adapters[name], scale) if name in adapters else part
    for name, part in params.items()
  }


def _is_matrix(path, leaf) -> bool:
  return path[-1].key == "kernel" and leaf.ndim == 3
