"""Page actions that read selected pages of the cache, and no others.

A rollout masks what an action drops, and so computes all of it. Where actions
drop nothing but pages, a token can be read by the step that decodes
(`ops.transformer_step`): each level of kappa is a branch of one program with
room for as many pages as it keeps, and kappa = 1 is the dense step, bit for
bit. The controller says at run time which of them runs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from models import transformer
from models.caches.paged import PageBudget, PagedCache
from ops.ceil_share import ceil_share
from research.sol.prefix import Prefix
from research.sol.rollout import Forward, Setup


def reads_pages(setup: Setup) -> bool:
  """Whether the actions of a set-up are read so, with the same results.

  They drop pages alone, which query heads share, and keep the first one and
  the token's own.
  """
  table = setup.table
  return (
    setup.drops_tokens
    and min(table.rho) == 1
    and min(table.bits) == 16
    and setup.shared_pages
    and setup.keep_sink_and_current
    and setup.config.has_token_kernel
  )


def memory(
  setup: Setup, prefix: Prefix, steps: int
) -> transformer.TransformerState:
  """What `forward` reads: the cache of one text and room for more.

  Args:
    setup: of `reads_pages`.
    prefix: of one window, all of its S tokens.
    steps: tokens that follow.
  """
  length = prefix.hidden.shape[1]
  state = transformer.init_state(
    setup.config, 1, cache_size=length + steps, dtype=prefix.k.dtype
  )
  lengths = jnp.full((1,), length, jnp.int32)
  cache = state.cache.filled((prefix.k, prefix.v), lengths)
  budget = PageBudget(keep=1.0, page_size=setup.page_size)
  return transformer.TransformerState(
    cache=PagedCache.of(cache, lengths, budget), length=lengths
  )


def forward(setup: Setup, params: transformer.Params) -> Forward:
  """Reads a token of one text by the pages that its action keeps.

  Args:
    setup: of `reads_pages`.
    params: of the frozen LLM.
  """
  levels = setup.table.levels("kappa")
  level_of = jnp.asarray(
    [levels.index(kappa) for kappa in setup.table.kappa], jnp.int32
  )

  def at(level: float):
    def read(state, token):
      total = state.length + 1
      kept = jnp.maximum(ceil_share(level, total), 1)
      # The last page may be filled in part, and is kept whole.
      num_pages = (kept + setup.page_size - 1) // setup.page_size
      hidden, state = transformer.read(
        setup.config,
        params,
        token,
        _with_keep(state, level),
        num_pages=num_pages,
      )
      return hidden, _with_keep(state, 1.0)

    return read

  branches = [at(level) for level in levels]

  def forward(state, token, action, t):
    del t
    level = level_of[action[0, 0]]
    return jax.lax.switch(level, branches, state, token)

  return forward


def _with_keep(state, keep: float):
  """The state with room for a share of the pages; its arrays are the same."""
  cache = state.cache
  budget = dataclasses.replace(cache.budget, keep=keep)
  return dataclasses.replace(
    state, cache=dataclasses.replace(cache, budget=budget)
  )
