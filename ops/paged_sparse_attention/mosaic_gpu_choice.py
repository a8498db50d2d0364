"""Which pages a thread block takes: a threshold of scores, then a list.

All thread blocks of a row's key head find the same threshold, and each lists a
share of the pages that reach it, in rising order. Scores lie in memory as rows
of 64 pages. Where pages do not fill the last row, it begins earlier, and pages
of the row in front of it do not count there.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_tiles import ROWS, TILE

_LOWEST = -(2**31)
_HIGHEST = 2**31 - 1
# Rows of scores are a multiple of so many.
_ROOM = 4
# Pages that are listed at once, and those that a thread lists of them, 128th.
_BLOCK = 512


def rows_of(pages: int) -> int:
  """Rows of scores that there is room for."""
  return -(-pages // (TILE * _ROOM)) * _ROOM


def list_sizes(listed: int) -> tuple[int, int]:
  """Pages that are listed at once, and how often, to list so many."""
  block = min(-(-listed // 128) * 128, _BLOCK)
  return block, -(-listed // block)


def scratch(*, pages: int, listed: int) -> dict:
  """Shared memory of `Choice`, by name, for as many pages as are listed."""
  block, times = list_sizes(listed)
  return {
    # Of a row, the pages that are kept: of its first 32 and of its last 32 as
    # bits, and how many.
    "kept_s": plgpu.SMEM((3, rows_of(pages)), jnp.int32),
    "pages_s": plgpu.SMEM((block * times,), jnp.int32),
  }


def _numbers(scores_ref, last, pages, layout):
  """Integers in the order of scores, which no two pages have in common.

  Their last bits tell the page, so that of scores that agree in the others, 19
  of them for 4,096 pages, the lower page has the higher number. Pages that are
  kept whatever they score, or not there, have the lowest.

  Returns:
    The numbers, and whether a page is kept whatever it scores.
  """
  shape = scores_ref.shape
  low = (1 << (shape[0] * TILE - 1).bit_length()) - 1
  bits = lax.bitcast_convert_type(
    plgpu.load(scores_ref, layout=layout, optimized=False), jnp.int32
  )
  # A bit less, so that differences of two numbers are numbers, too.
  bits = jnp.where(bits < 0, bits ^ _HIGHEST, bits) >> 1
  iota = lambda axis: plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=layout
  )
  begin = iota(0) * TILE
  page = begin + iota(1)
  forced = (page == 0) | (page == last)
  others = (page > 0) & (page < last)
  if pages % TILE:
    page = jnp.minimum(begin, pages - TILE) + iota(1)
    there = page >= begin
    forced = there & ((page == 0) | (page == last))
    others = there & (page > 0) & (page < last)
  return jnp.where(others, (bits & ~low) | (low - page), _LOWEST), forced


def _threshold(found, count, wanted):
  """The number that `wanted` of `count` pages reach.

  The interval that it lies in is cut into three parts at a time: one sum over
  all threads counts for both cuts.
  """
  reach = lambda cut: (found >= cut).astype(jnp.int32)
  highest = jnp.max(found)
  lowest = -jnp.max(jnp.where(found > _LOWEST, -found, _LOWEST))

  def cut(state):
    begin, end, reached = state
    third = jnp.maximum(lax.div(end - begin, jnp.int32(3)), 1)
    near, far = begin + third, begin + 2 * third
    both = jnp.sum(reach(near) + (reach(far) << 16))
    of_near, of_far = both & 0xFFFF, both >> 16
    is_far, is_near = of_far >= wanted, of_near >= wanted
    return (
      jnp.where(is_far, far, jnp.where(is_near, near, begin)),
      jnp.where(is_far, end, jnp.where(is_near, far, near)),
      jnp.where(is_far, of_far, jnp.where(is_near, of_near, reached)),
    )

  unsettled = lambda state: (state[2] > wanted) & (wanted > 0)
  start = lowest, highest + 1, count
  begin, _, _ = lax.while_loop(unsettled, cut, start)
  return jnp.where(wanted > 0, begin, _HIGHEST)


def choose(scores_ref, s: dict, last, kept, share, *, pages: int) -> None:
  """Lists a share of the kept pages in `s["pages_s"]`, in rising order.

  Args:
    scores_ref: Scores of a row's head, (R, 64) float32; those of pages behind
      the last one may be anything.
    s: What `scratch` names.
    last: Page of the last token, -1 where there is none.
    kept: Pages to keep, the first and the last one among them.
    share: The range of these that is listed, begin and end.
    pages: P.
  """
  groups = scores_ref.shape[0]
  always = jnp.minimum(last + 1, 2)
  strided = plgpu.Layout.WG_STRIDED((groups, TILE), vec_size=2)
  found, _ = _numbers(scores_ref, last, pages, strided)
  threshold = _threshold(found, last + 1 - always, kept - always)

  found, forced = _numbers(scores_ref, last, pages, ROWS)
  chosen = (found >= threshold) | forced
  column = plgpu.broadcasted_iota(jnp.int32, (groups, TILE), 1, layout=ROWS)
  bits = lax.shift_left(jnp.where(chosen, 1, 0), column & 31)
  for i, value in enumerate((
    jnp.where(column < 32, bits, 0),
    jnp.where(column < 32, 0, bits),
    jnp.where(chosen, 1, 0),
  )):  # fmt: skip
    hopper_tiles.store(s["kept_s"].at[i], jnp.sum(value, axis=1))

  begin, _ = share
  block, times = list_sizes(s["pages_s"].shape[0])
  layout = plgpu.Layout.WG_STRIDED((block,), vec_size=1)
  places = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=layout)
  zeros = plgpu.layout_cast(jnp.zeros((block,), jnp.int32), layout)

  def listed(i, _=None):
    rank = places + (begin + i * block)

    def rows(k, state):
      before, *state = state
      for group in range(_ROOM):
        group = k * _ROOM + group
        first, second, count = (s["kept_s"][j, group] for j in range(3))
        inside = (rank >= before) & (rank < before + count)
        page = group * TILE
        if pages % TILE:
          page = jnp.minimum(page, pages - TILE)
        now = first, second, rank - before, page
        # Of a scalar from memory the compiler does not know its sign.
        state = [
          jnp.where(inside, zeros + new, old) for new, old in zip(now, state)
        ]
        before += count
      return before, *state

    _, *state = lax.fori_loop(
      jnp.int32(0), jnp.int32(groups // _ROOM), rows,
      (jnp.int32(0), zeros, zeros, zeros, zeros),
    )  # fmt: skip
    hopper_tiles.store(s["pages_s"].at[pl.ds(i * block, block)], _place(*state))

  if times == 1:
    listed(0)
  else:
    pl.loop(0, times)(listed)


def _place(first, second, rank, page) -> jax.Array:
  """The page whose bit has `rank` set bits in front of it, of 64 pages."""
  count = _ones(first)
  behind = rank >= count
  word = jnp.where(behind, second, first)
  rank = jnp.where(behind, rank - count, rank)
  page = jnp.where(behind, page + 32, page)
  for width in (16, 8, 4, 2, 1):
    low = word & ((1 << width) - 1)
    count = _ones(low)
    behind = rank >= count
    word = jnp.where(behind, lax.shift_right_logical(word, width), low)
    rank = jnp.where(behind, rank - count, rank)
    page = jnp.where(behind, page + width, page)
  return page


def _ones(x: jax.Array) -> jax.Array:
  """How many bits are set."""
  shift = lax.shift_right_logical
  x = x - (shift(x, 1) & 0x55555555)
  x = (x & 0x33333333) + (shift(x, 2) & 0x33333333)
  x = (x + shift(x, 4)) & 0x0F0F0F0F
  return shift(x * 0x01010101, 24)
