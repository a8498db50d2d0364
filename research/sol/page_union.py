"""How many pages the query heads of a group read together.

Every query head chooses its own pages, and the cache is read once for all that
any head of its group chose. How much longer that list is than one head's is
measured here, on dense hidden states of training text.

Axis letters: W windows, S tokens, Q queries, H query heads, N key/value heads,
G = H / N, K head dimension, P pages, L levels of kappa.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import ops
from models import transformer
from models.attention import causal_attend
from research.sol.rollout import Setup


def measure(
  setup: Setup,
  params: transformer.Params,
  windows: np.ndarray,
  *,
  first: int,
  batch: int,
) -> dict[float, float]:
  """Pages of a group over pages of a head, by kappa; 1 where all are read.

  Args:
    setup: model, levels, pages.
    params: of the frozen LLM.
    windows: (W, S) tokens; what does not fill a page is left out.
    first: tokens before the first query; queries are the last tokens of pages.
    batch: windows alive at a time; W is cut down to a multiple of it.
  """
  levels = setup.table.levels("kappa")
  alone = setup.config.num_heads == setup.config.num_kv_heads
  if alone or setup.shared_pages or levels == (1.0,):
    return dict.fromkeys(levels, 1.0)
  batch = min(batch, len(windows))
  length = windows.shape[1] // setup.page_size * setup.page_size
  total = np.zeros((2, len(levels)))
  for at in range(0, len(windows) - batch + 1, batch):
    tokens = setup.begun(jnp.asarray(windows[at : at + batch, :length]))
    total += np.asarray(_counts(setup, params, tokens, first), np.float64)
  union, own = total
  return dict(zip(levels, (union / own).tolist(), strict=True))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _counts(setup, params, tokens, first):
  """Pages that groups chose, and that their heads chose in the mean: (2, L)."""
  page, heads = setup.page_size, setup.config.num_kv_heads
  own_page = jnp.arange(first // page, tokens.shape[1] // page)
  ends = own_page * page + page - 1
  pages = jnp.arange(tokens.shape[1] // page)
  own = pages[None] == own_page[:, None]

  def chosen(scores, kappa, least):
    valid = (pages[None] <= own_page[:, None]) & (
      (pages[None] + 1) * page > least[:, None]
    )
    always = None
    if setup.keep_sink_and_current:
      always = (valid & ((pages[None] == 0) | own))[None, :, None, None]
    total = ends + 1 - least // page * page
    budget = jnp.maximum(jnp.ceil(kappa * total - 1e-3), 1)
    budget = jnp.ceil(budget / page).astype(jnp.int32)
    kept = ops.select_pages(
      scores,
      budget[None, :, None, None],
      valid=valid[None, :, None, None],
      always=always,
    )
    return jnp.sum(jnp.any(kept, 3)), jnp.sum(kept) / kept.shape[3]

  dense = causal_attend(implementation=setup.attention, keep=False)

  def attend(q, k, v, _, behind=None):
    # The first token that each query sees.
    least = jnp.zeros_like(ends)
    if behind is not None:
      least = jnp.maximum(ends - behind, 0)
    bounds = ops.page_bounds(k, page_size=page)
    scores = ops.page_scores(q[:, ends], *bounds)
    scores = scores.reshape(*scores.shape[:2], heads, -1, scores.shape[-1])
    counts = [
      jnp.stack(chosen(scores, kappa, least)).astype(jnp.float32)
      for kappa in setup.table.levels("kappa")
    ]
    seen = () if behind is None else (behind,)
    mixed, _ = dense(q, k, v, None, *seen)
    return mixed, jnp.stack(counts, axis=1)

  model = transformer.bind(setup.config, params)
  positions = transformer.token_positions(tokens)
  _, by_layer = model(model.embed(tokens), positions, attend)
  return jnp.sum(by_layer, axis=0)
