"""The second kernel: chooses pages by their scores, and attends to them.

All thread blocks of a row's key head choose the same pages, and each takes an
equal share of these, in rising order. A page is a copy of its own; some of them
make up a tile of 64 slots, from where on `hopper_attention` does all.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_attention, hopper_tiles
from ops.hopper_tiles import ROWS, TILE

NAME = "paged_sparse_attention"
_LOWEST = -(2**31)
_HIGHEST = 2**31 - 1
# Pages that are listed at once.
_STEP = 16


def attend(
  layer, q, caches, scores, lengths, num_pages,
  *, pages, max_pages, scale, splits, stages, interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """Attends to the best pages, a share of them in each split.

  Args:
    layer: (1,) int32.
    q: (B, N, 8, K) bfloat16.
    caches: Keys and values, (L, B, S, N, K) bfloat16.
    scores: (B, N, R, 64) float32, of R 64 pages, in rising order; of those
      behind the last one they may be anything.
    lengths: (B,) int32, slots that are filled.
    num_pages: (B, N) int32, pages to keep, at least 2.
    pages: P.
    max_pages: Pages that are kept at most.
    scale: Of logits, to base 2.
    splits: Thread blocks that share the pages of a row's head.
    stages: Tiles of keys or values in shared memory.
    interpret: False, or the parameters of the interpreter.

  Returns:
    The mixed values of each split, (B, N, splits, 8, K), the maxima of its
    logits and the sums of its exponentials, (B, N, splits, 8), all float32.
  """
  batch, slots, heads, size = caches[0].shape[1:]
  page_size, parts = slots // pages, size // TILE
  groups = scores.shape[2]
  each, listed = TILE // page_size, -(-max_pages // splits)
  most = -(-listed // each)
  low = (1 << (groups * TILE - 1).bit_length()) - 1
  strided = plgpu.Layout.WG_STRIDED((groups, TILE), vec_size=2)

  def numbers(scores_ref, last):
    """Integers in the order of scores, which no two pages have in common.

    Their last bits tell the page, so that of scores that agree in the others,
    19 of them for 4,096 pages, the lower page has the higher number. Pages that
    are kept whatever they score, or not there, have the lowest.
    """
    bits = lax.bitcast_convert_type(
      plgpu.load(scores_ref, layout=strided, optimized=False), jnp.int32
    )
    # A bit less, so that differences of two numbers are numbers, too.
    bits = jnp.where(bits < 0, bits ^ _HIGHEST, bits) >> 1
    iota = lambda axis: plgpu.broadcasted_iota(
      jnp.int32, (groups, TILE), axis, layout=strided
    )
    page = iota(0) * TILE + iota(1)
    others = (page > 0) & (page < last)
    found = jnp.where(others, (bits & ~low) | (low - page), _LOWEST)
    return found, (page == 0) | (page == last)

  def threshold_of(found, count, wanted):
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

  def kernel(
    layer_ref, q_ref, scores_ref, lengths_ref, wanted_ref, keys_ref,
    values_ref, mixed_ref, most_ref, total_ref, *, kept_s, counts_s, pages_s,
    **s,
  ):  # fmt: skip
    split, head, row = (
      lax.axis_index(name) for name in ("split", "head", "row")
    )
    layer, length = layer_ref[0], lengths_ref[row]
    hopper_attention.fetch_queries(q_ref.at[row, head], s)

    # Of no slots the last page is -1: nothing is kept.
    last = lax.div(length + page_size - 1, jnp.int32(page_size)) - 1
    kept = jnp.minimum(
      jnp.minimum(wanted_ref[row, head], jnp.int32(max_pages)), last + 1
    )
    begin, end = (
      lax.div((split + i) * kept, jnp.int32(splits)) for i in range(2)
    )
    count = end - begin
    found, forced = numbers(scores_ref.at[row, head], last)
    always = jnp.minimum(last + 1, 2)
    threshold = threshold_of(found, last + 1 - always, kept - always)
    chosen = ((found >= threshold) | forced).astype(jnp.int32)
    hopper_tiles.store(kept_s, chosen)
    plgpu.commit_smem()
    of_groups = jnp.sum(
      plgpu.load(kept_s, layout=ROWS, optimized=False), axis=1
    )
    hopper_tiles.store(counts_s, of_groups)
    plgpu.commit_smem()

    def skip(i, state):
      group, before = state
      more = before + counts_s[i]
      passed = (more <= begin) & (group == i)
      return (
        jnp.where(passed, i + 1, group),
        jnp.where(passed, more, before),
      )

    group, before = lax.fori_loop(
      jnp.int32(0), jnp.int32(groups), skip, (jnp.int32(0), jnp.int32(0))
    )

    def note(state):
      page, rank = state
      for i in range(_STEP):
        now = page + i
        inside = kept_s[
          lax.div(now, jnp.int32(TILE)), lax.rem(now, jnp.int32(TILE))
        ]
        own = (inside > 0) & (rank >= begin) & (rank < end)

        @pl.when(own)
        def _(now=now, rank=rank):
          pages_s[rank - begin] = now

        rank = rank + inside
      return page + _STEP, rank

    lax.while_loop(lambda state: state[1] < end, note, (group * TILE, before))
    plgpu.commit_smem()
    # The last page that is kept may not be full.
    rest = jnp.where(end == kept, (last + 1) * page_size - length, 0)
    filled = count * page_size - rest
    tiles = lax.div(count + each - 1, jnp.int32(each))

    def copy(ref, tile, slot):
      for i in range(each):
        # In the place of a page behind the last one that one comes again.
        page = pages_s[jnp.minimum(tile * each + i, count - 1)]
        own = pl.ds(pl.multiple_of(page * page_size, page_size), page_size)
        for part in range(parts):
          plgpu.copy_gmem_to_smem(
            ref.at[layer, row, own, head, pl.ds(part * TILE, TILE)],
            s["ring"].at[slot, part, pl.ds(i * page_size, page_size)],
            s["loaded"].at[slot],
          )

    outs = (
      ref.at[row, head, split] for ref in (mixed_ref, most_ref, total_ref)
    )
    hopper_attention.attend(
      copy, keys_ref, values_ref, tuple(outs), s,
      count=tiles, filled=filled, scale=scale,
    )  # fmt: skip

  run = plgpu.kernel(
    kernel,
    out_type=hopper_attention.outputs((batch, heads, splits), size),
    grid=(splits, heads, batch),
    grid_names=("split", "head", "row"),
    scratch_types={
      "kept_s": plgpu.SMEM((groups, TILE), jnp.int32),
      "counts_s": plgpu.SMEM((groups,), jnp.int32),
      "pages_s": plgpu.SMEM((listed,), jnp.int32),
      **hopper_attention.scratch(
        parts=parts, tiles=most, stages=stages, copies=each
      ),
    },
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(layer, q, scores, lengths, num_pages, *caches)
