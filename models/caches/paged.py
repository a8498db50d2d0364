"""Every key and value, of which a new token reads the best pages alone.

Shapes by axis letter: L layers, B batch, S cache slots, P pages, N key/value
heads, K head dimension.
"""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp

from models.caches.dense import DenseCache
from models.errors import InputError
from ops.ceil_share import ceil_share
from ops.paged_sparse_attention import (
  KINDS,
  KeptPages,
  PageSummary,
  page_summary,
  update_page_summary,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageBudget:
  """How much of a cache a token reads.

  Attributes:
    keep: Share of the pages that hold a token, in (0, 1]; at least two pages
      of each key head are read, the first and the token's own. With 1 a token
      is read by the very step that knows no pages.
    page_size: Slots of a page.
    kind: Of `ops.paged_sparse_attention.KINDS`, what pages are scored by.
  """

  keep: float
  page_size: int = 16
  kind: str = "bounds"

  @classmethod
  def of(cls, keep: float | None) -> Self | None:
    """That of a share of the usual pages; None for None.

    Raises:
      InputError: it is out of range.
    """
    return None if keep is None else cls(keep=keep)

  def __post_init__(self):
    """Checks the fields.

    Raises:
      InputError: one is out of range.
    """
    if not 0 < self.keep <= 1:
      raise InputError(f"keep={self.keep}: give a share above 0, at most 1")
    if self.page_size < 1 or self.kind not in KINDS:
      raise InputError(
        f"page_size={self.page_size}, kind={self.kind}: give a positive size "
        f"and one of {', '.join(KINDS)}"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache(DenseCache):
  """A `DenseCache` and the summaries of its pages.

  `ops.transformer_step` alone reads it by pages, one token at a time.

  Attributes:
    summary: (L, B, P, N, K), of the slots that are filled.
    budget: how much of it a token reads.
  """

  summary: PageSummary
  budget: PageBudget = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(
    cls, cache: DenseCache, lengths: jax.Array, budget: PageBudget
  ) -> Self:
    """A cache that holds what `cache` does.

    Args:
      cache: of which `lengths` (B,) slots are filled.
      lengths: int32.
      budget: of the tokens to come.

    Raises:
      InputError: keys are kept in few bits.
    """
    if not isinstance(cache.k, jax.Array):
      raise InputError("pages are of keys that are not quantized")
    size = budget.page_size
    more = -cache.k.shape[2] % size
    if more:
      # Slots that nothing is written to, for whole pages.
      pad = lambda x: jnp.pad(x, [(0, 0)] * 2 + [(0, more)] + [(0, 0)] * 2)
      cache = DenseCache(k=pad(cache.k), v=pad(cache.v))
    first, second = jax.lax.map(
      lambda keys: tuple(
        jax.tree.leaves(
          page_summary(keys, lengths, page_size=size, kind=budget.kind)
        )
      ),
      cache.k,
    )
    summary = PageSummary(first, second, budget.kind)
    return cls(k=cache.k, v=cache.v, summary=summary, budget=budget)

  def pages(
    self, lengths: jax.Array, num_pages: jax.Array | None = None
  ) -> KeptPages | None:
    """What the next token of rows of `lengths` (B,) is to read; None for all.

    Args:
      lengths: int32.
      num_pages: (B,) int32, pages of each key head, no more than the budget has
        room for; None for what the budget says.
    """
    if self.budget.keep == 1:
      return None
    layers, rows, count, heads, _ = self.summary.first.shape
    keep = self.budget.keep
    if num_pages is None:
      num_pages = ceil_share(keep, lengths // self.budget.page_size + 1)
    shape = layers, rows, heads
    return KeptPages(
      self.summary,
      jnp.broadcast_to(num_pages[None, :, None], shape),
      max(math.ceil(keep * count), 2),
    )

  def grown(
    self,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    summary: PageSummary | None,
  ) -> Self:
    """The cache behind one more token of each row.

    Args:
      keys: (L, B, S, N, K), with its own.
      values: alike.
      lengths: (B,) int32, slots that are filled, with its own.
      summary: with that of its page; None where the step has not made it.
    """
    if summary is None:
      update = jax.vmap(update_page_summary, in_axes=(0, 0, None))
      summary = update(self.summary, keys, lengths)
    return dataclasses.replace(self, k=keys, v=values, summary=summary)
