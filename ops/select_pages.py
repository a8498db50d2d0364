"""Query-aware selection of pages of a key cache (Quest)."""

import jax
import jax.numpy as jnp
import numpy as np

from ops import dispatch
from ops.top_mask import top_mask

IMPLEMENTATIONS = dispatch.XLA_ONLY


def page_bounds(k: jax.Array, *, page_size: int) -> tuple[jax.Array, jax.Array]:
  """Takes the channel-wise minimum and maximum of every page of keys.

  Args:
    k: Keys, (..., S, N, D), S a multiple of `page_size`.
    page_size: Tokens a page.

  Returns:
    `(page_min, page_max)`, each (..., S // page_size, N, D) in k's dtype.

  Raises:
    ValueError: S is not a multiple of `page_size`.
  """
  length = k.shape[-3]
  if length % page_size:
    raise ValueError(
      f"page_bounds: {length} keys do not fill pages of {page_size}; pad them"
    )
  pages = k.reshape(
    *k.shape[:-3], length // page_size, page_size, *k.shape[-2:]
  )
  return jnp.min(pages, axis=-3), jnp.max(pages, axis=-3)


def page_scores(
  q: jax.Array, page_min: jax.Array, page_max: jax.Array
) -> jax.Array:
  """Bounds from above the attention logit of a query with any key of a page.

  Quest (https://arxiv.org/abs/2406.10774), section 3.3:

    score = sum_d max(q_d * min_d, q_d * max_d) = relu(q) . max - relu(-q) . min

  The second form is two matrix products, so nothing of size T * P * D exists.

  Args:
    q: Queries, (..., T, H, D); query head h reads key head h // (H / N).
    page_min: Minima from `page_bounds`, (..., P, N, D).
    page_max: Maxima from `page_bounds`, (..., P, N, D).

  Returns:
    Scores, (..., T, H, P), float32. They are not scaled.
  """
  kv_heads = page_min.shape[-2]
  *lead, heads, dim = q.shape
  grouped = q.reshape(*lead, kv_heads, heads // kv_heads, dim)

  def product(a, b):
    return jnp.einsum(
      "...tngd,...pnd->...tngp", a, b, preferred_element_type=jnp.float32
    )

  scores = product(jax.nn.relu(grouped), page_max) - product(
    jax.nn.relu(-grouped), page_min
  )
  return scores.reshape(*lead, heads, page_min.shape[-3])


def select_pages(
  scores: jax.Array,
  num_pages: jax.Array | int,
  *,
  valid: jax.Array,
  always: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Marks the `num_pages` best valid pages; ties are kept.

  A valid page is marked if and only if fewer than `num_pages` valid pages have
  strictly higher scores (Quest, https://arxiv.org/abs/2406.10774). Pages in
  `always` are marked first and use up the budget; the others compete among
  themselves for what is left.

  Args:
    scores: Scores without NaN, (..., P), any float dtype.
    num_pages: Budget, integer: a scalar, or an array that broadcasts against
      `scores` without P.
    valid: Pages that exist, bool, broadcasts against `scores`.
    always: Pages that are kept whenever valid, bool, broadcasts against
      `scores`; None for no such page.
    implementation: `"xla"`, or None for the best that runs here.

  Returns:
    The mask, (..., P), bool. The selection carries no gradient.
  """
  dispatch.resolve("select_pages", IMPLEMENTATIONS, implementation)
  return _select_pages(scores, num_pages, valid, always)


def _select_pages(
  scores: jax.Array,
  num_pages: jax.Array | int,
  valid: jax.Array,
  always: jax.Array | None,
) -> jax.Array:
  valid = jnp.broadcast_to(valid, scores.shape)
  budget = jnp.broadcast_to(num_pages, scores.shape[:-1]).astype(jnp.int32)
  if always is None:
    return _top_among(scores, budget, valid)
  forced = jnp.broadcast_to(always, scores.shape) & valid
  budget = budget - jnp.sum(forced, axis=-1, dtype=jnp.int32)
  return forced | _top_among(scores, budget, valid & ~forced)


def _top_among(scores, budget, candidates):
  lowest = jnp.asarray(-jnp.inf, scores.dtype)
  return candidates & top_mask(jnp.where(candidates, scores, lowest), budget)


def select_pages_reference(
  scores: np.ndarray,
  num_pages: np.ndarray,
  *,
  valid: np.ndarray,
  always: np.ndarray | None = None,
) -> np.ndarray:
  """The specification; arrays as in `select_pages`, one page at a time."""
  scores = np.asarray(scores, np.float64)
  valid = np.broadcast_to(valid, scores.shape)
  num_pages = np.broadcast_to(num_pages, scores.shape[:-1])
  forced = (
    np.zeros(scores.shape, bool)
    if always is None
    else (np.broadcast_to(always, scores.shape) & valid)
  )
  out = np.zeros(scores.shape, bool)
  for row in np.ndindex(*scores.shape[:-1]):
    others = [p for p in range(scores.shape[-1]) if (valid & ~forced)[row][p]]
    free = num_pages[row] - np.sum(forced[row])
    for p in range(scores.shape[-1]):
      better = sum(scores[row][j] > scores[row][p] for j in others)
      out[row][p] = forced[row][p] or (p in others and better < free)
  return out
