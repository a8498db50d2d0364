"""Blocks that choose a level of their own.

BitMoD (https://arxiv.org/abs/2411.11745) and RaZeR
(https://arxiv.org/abs/2501.04052) let the second code of zero, which a float
type wastes, stand for a level that each block chooses among a few.

Shapes by axis letter: G blocks of K values, N special levels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ops.quantized.formats import Format

# (form, ratios) -> codes of the nearest levels that all blocks have.
Nearest = Callable[[Format, jax.Array], jax.Array]


def tops(form: Format) -> np.ndarray:
  """The largest magnitude of a block's levels for each special one, (N,)."""
  whole = np.abs(form.levels).max()
  return np.maximum(np.abs(form.specials), whole).astype(np.float32)


def errors(
  form: Format,
  blocks: jax.Array,
  scales: list[jax.Array],
  axes: tuple[int, ...],
  nearest: Nearest,
) -> jax.Array:
  """Squared errors that each special level leaves each block.

  Args:
    form: that has special levels.
    blocks: (..., G, K) float32.
    scales: of each special level, the shape of `blocks` with 1 for `axes`.
    axes: of a block.
    nearest: finds codes.

  Returns:
    (N, ...) float32, of the shape of a scale.
  """
  found = []
  for special, scale in zip(form.specials, scales):
    ratios = blocks / jnp.where(scale == 0, 1.0, scale)
    codes = encode(form, ratios, jnp.float32(special), nearest)
    error = decode(form, codes, jnp.float32(special)) * scale - blocks
    found.append(jnp.sum(jnp.square(error), axes, keepdims=True))
  return jnp.stack(found)


def encode(
  form: Format, ratios: jax.Array, special: jax.Array, nearest: Nearest
) -> jax.Array:
  """Codes of the nearest of the codebook's levels and the special one.

  Args:
    form: that has special levels.
    ratios: (..., G, K).
    special: the level of each block, (..., G, 1), or ().
    nearest: finds codes.

  Returns:
    (..., G, K) in the format's dtype.
  """
  codes = nearest(form, ratios)
  ordinary = jnp.asarray(form.codebook, jnp.float32)[codes]
  nearer = jnp.abs(ratios - special) < jnp.abs(ratios - ordinary)
  return jnp.where(nearer, len(form.codebook), codes).astype(form.dtype)


def decode(form: Format, codes: jax.Array, special: jax.Array) -> jax.Array:
  """The inverse of `encode`.

  Args:
    form: that has special levels.
    codes: (..., G, K).
    special: the level of each block, (..., G, 1), or ().

  Returns:
    Levels (..., G, K), float32.
  """
  # The entry behind the codebook's is not used.
  table = jnp.asarray((*form.codebook, 0.0), jnp.float32)
  return jnp.where(codes == len(form.codebook), special, table[codes])
