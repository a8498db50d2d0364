"""The kernel: scores of all pages, a choice among them, and their attention.

The thread blocks of a cluster share a row's key head. Each scores some of its
pages and gives the others these scores; all choose the same pages, and each
attends to a share of them, as `hopper_attention` does, some tiles of 64 slots
at a time. What they found is merged at last.

Hopper's matrix unit takes pages, slots, or 64 of a head's numbers, as the rows
of a tile, and the queries of a key head as its columns, of which there are
eight, be the queries fewer.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_attention import QUERIES
from ops.hopper_tiles import ROWS, SUMS, TILE
from ops.paged_sparse_attention import mosaic_gpu_choice as choice
from ops.paged_sparse_attention import mosaic_gpu_ring as rings
from ops.paged_sparse_attention.summary import weights

NAME = "paged_sparse_attention"
# A vector of 64 numbers of a head, which every warp has.
_NUMBERS = ROWS.reduce(0)
_QUERY = ROWS.reduce(1)
# Keys of a page, of which each thread has some columns, and every warp all.
_COLUMNS = plgpu.Layout.TILED(
  plgpu.Tiling(((8, TILE), (2,))), (plgpu.Replicated(4),), (-2,), -1
)
# Finite, so that blocks without a slot are merged as nothing.
_UNSEEN = -1e30


def attend(
  layer, q, caches, summary, lengths, num_pages,
  *, shared, kind, max_pages, scale, summarize, config, interpret,
) -> tuple[jax.Array, ...]:  # fmt: skip
  """Attends to the best pages.

  Args:
    layer: (1,) int32.
    q: (B or more, N Q, K) bfloat16, Q queries a key head.
    caches: Keys and values, (L, B, S, N, K) bfloat16.
    summary: Both parts, (L, B, P, N, K) bfloat16, of 64 pages at least.
    lengths: (B,) int32, slots that are filled.
    num_pages: (L, B, N) int32, pages to keep, at least 2.
    shared: G, of the queries of a key head those that count, the first ones.
    kind: Of the summary.
    max_pages: Pages that are kept at most.
    scale: Of logits, to base 2.
    summarize: Whether to summarize each row's last page.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    As many rows as q has of (N G, K) bfloat16, of those past B anything, and
    with `summarize` both parts of a summary, (B, 1, N, K).
  """
  batch, slots, heads, size = caches[0].shape[1:]
  pages = summary[0].shape[2]
  c, parts = config, size // TILE
  wide = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  across = batch, heads, c.splits, QUERIES
  narrow = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  outputs = {"out": narrow(q.shape[0], heads * shared, size)}
  if summarize:
    last = narrow(batch, 1, heads, size)
    outputs |= {"last_first": last, "last_second": last}
  found = len(outputs)
  outputs |= {
    "scores": wide(batch, heads, choice.rows_of(pages), TILE),
    "mixed": wide(*across, size),
    "most": wide(*across),
    "total": wide(*across),
  }
  tiles = lambda *shape: hopper_tiles.swizzled(
    (*shape, parts, QUERIES, TILE), jnp.bfloat16, 16
  )
  scratch = {
    "q_s": tiles(),
    "weights_s": tiles(2),
    # Four more than needed let the threads of a warp store to all banks.
    "scores_s": plgpu.SMEM((c.tiles, QUERIES, TILE + 4), jnp.float32),
    "shares_s": hopper_tiles.swizzled(
      (c.tiles, QUERIES, TILE), jnp.bfloat16, 16
    ),
    "mixed_s": plgpu.SMEM((QUERIES, TILE + 4), jnp.float32),
    **choice.scratch(pages=pages, listed=-(-max_pages // c.splits)),
    **rings.scratch(
      parts=parts, stages=c.stages, copies=TILE * pages // slots,
      interpret=interpret,
    ),
  }  # fmt: skip
  clusters = {}
  if c.splits > 1:
    clusters = {"cluster": (c.splits,), "cluster_names": ("split",)}
    for name in ("scored", "attended"):
      scratch[name] = plgpu.ClusterBarrier(collective_axes=("split",))
  names = "layer", "q", "lengths", "wanted", "first", "second", "keys", "values"

  def kernel(*refs, **s):
    named = dict(zip((*names, *outputs), refs, strict=True))
    block = _Block(
      named, s, c, kind=kind, shared=shared, pages=pages,
      max_pages=max_pages, scale=scale, interpret=interpret,
    )  # fmt: skip
    block.run()

  run = plgpu.kernel(
    kernel,
    out_type=tuple(outputs.values()),
    grid=(heads, batch),
    grid_names=("head", "row"),
    **clusters,
    scratch_types=scratch,
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(layer, q, lengths, num_pages, *summary, *caches)[:found]


class _Block:
  """A thread block at work."""

  def __init__(
    self, refs, s, config, *, kind, shared, pages, max_pages, scale, interpret
  ):
    """Takes references and shared memory by name, and `attend`'s sizes."""
    self.refs, self.s, self.config, self.kind = refs, s, config, kind
    self.shared, self.pages, self.max_pages = shared, pages, max_pages
    self.scale, self.interpret = scale, interpret
    self.parts = refs["q"].shape[-1] // TILE
    self.page = refs["keys"].shape[2] // pages
    # Pages of a tile of keys.
    self.each = TILE // self.page
    self.splits, self.split = config.splits, jnp.int32(0)
    if config.splits > 1:
      self.split = lax.axis_index("split")
    self.head, self.row = lax.axis_index("head"), lax.axis_index("row")
    self.at = refs["layer"][0], self.row, self.head
    self.length = refs["lengths"][self.row]
    # Read here, where nothing waits for it.
    self.wanted = refs["wanted"][self.at]
    # Of no slots the last page is -1: nothing is kept.
    self.last = lax.div(self.length + self.page - 1, jnp.int32(self.page)) - 1
    self.ring = rings.Ring(s, interpret)

  def run(self):
    """All of it."""
    scored = self.score()
    self.meet("scored", self.summarize_once)
    kept = jnp.minimum(
      jnp.minimum(self.wanted, jnp.int32(self.max_pages)), self.last + 1
    )
    begin, end = self.share(kept)
    choice.choose(
      self.refs["scores"].at[self.row, self.head], self.s, self.last, kept,
      (begin, end), pages=self.pages,
    )  # fmt: skip
    # The last page that is kept may not be full.
    rest = jnp.where(end == kept, (self.last + 1) * self.page - self.length, 0)
    count = end - begin
    found = self.attend(scored, count, count * self.page - rest)
    for name, value in zip(("most", "total"), found[:2]):
      hopper_tiles.store(
        self.refs[name].at[self.row, self.head, self.split], value
      )
    for part, value in enumerate(found[2:]):
      own = pl.ds(part * TILE, TILE)
      hopper_tiles.store(
        self.refs["mixed"].at[self.row, self.head, self.split, :, own], value
      )
    self.meet("attended")
    self.merge()

  def share(self, count):
    """The range of `count` things that this block takes."""
    return tuple(
      lax.div((self.split + i) * count, jnp.int32(self.splits))
      for i in range(2)
    )

  def meet(self, name, meanwhile=lambda: None):
    """Waits for the blocks of the cluster, and sees what they have stored."""
    if self.splits > 1:
      rings.meet(self.s[name], meanwhile, self.interpret)
    else:
      meanwhile()

  def score(self):
    """Scores a share of the pages; returns how many tiles it has fetched."""
    s, ring, stages = self.s, self.ring, self.ring.stages
    filled = lax.div(self.last + TILE, jnp.int32(TILE))
    begin, end = self.share(filled)
    total = 2 * (end - begin)

    def first_page(n):
      page = (begin + (n >> 1)) * TILE
      if self.pages % TILE:
        # The last tile begins earlier rather than to end behind the pages.
        page = jnp.minimum(page, self.pages - TILE)
      return page

    def fetch(n):
      rows = TILE // self.each if self.interpret else TILE
      begins = [first_page(n) + i for i in range(0, TILE, rows)]
      for which, name in enumerate(("first", "second")):

        @pl.when((n < total) & ((n & 1) == which))
        def _(name=name):
          ring.fetch(n, self.refs[name], self.at, begins, rows)

    pl.loop(0, stages)(fetch)
    self.load_queries()

    @pl.loop(begin, end)
    def _(tile):
      n = 2 * (tile - begin)
      slots = ring.wait(n), ring.wait(n + 1)

      def products(sums):
        for which, slot in enumerate(slots):
          for part in range(self.parts):
            plgpu.wgmma(
              sums, ring.tiles.at[slot, part], s["weights_s"].at[which, part].T
            )
        plgpu.wgmma_wait(0)
        return sums[...]

      found = pl.run_scoped(products, plgpu.ACC((TILE, QUERIES), jnp.float32))
      for which in range(2):
        fetch(n + which + stages)
      # Columns without a query have the weights of the first one.
      hopper_tiles.store(
        self.refs["scores"].at[self.row, self.head, tile],
        jnp.max(found, axis=1),
      )

    return total

  def summarize_once(self):
    """Calls `summarize` in one block of the cluster, if it is asked for."""
    if "last_first" in self.refs:
      pl.when(self.split == self.splits - 1)(self.summarize)

  def summarize(self):
    """Summarizes the keys of the last page, as `last_page_summary` does."""
    shape, begin = (self.page, TILE), jnp.maximum(self.last, 0) * self.page
    places = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_COLUMNS)
    seen = places < self.length - begin
    layer, row, head = self.at
    for part in range(self.parts):
      own = pl.ds(part * TILE, TILE)
      keys = hopper_tiles.load(
        self.refs["keys"].at[layer, row, pl.ds(begin, self.page), head, own],
        _COLUMNS,
      )
      if self.kind == "bounds":
        found = (
          -jnp.max(jnp.where(seen, -keys, -jnp.inf), axis=0),
          jnp.max(jnp.where(seen, keys, -jnp.inf), axis=0),
        )
      else:
        share = 1 / jnp.maximum(self.length - begin, 1).astype(jnp.float32)
        mean = jnp.sum(jnp.where(seen, keys, 0.0), axis=0) * share
        far = keys - hopper_tiles.repeat(mean, 1, shape, _COLUMNS)
        squares = jnp.sum(jnp.where(seen, far * far, 0.0), axis=0)
        found = mean, jnp.sqrt(squares * share)
      for name, value in zip(("last_first", "last_second"), found):
        value = jnp.where(self.length > 0, value, 0.0)
        hopper_tiles.store(
          self.refs[name].at[row, 0, head, own], value.astype(jnp.bfloat16)
        )

  def load_queries(self):
    """Brings queries, and what summaries are multiplied by, to their places.

    Columns that have no query of their own get the first one.
    """
    shape = QUERIES, TILE
    stride = self.refs["q"].shape[1] // self.refs["keys"].shape[3]
    query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ROWS)
    for part in range(self.parts):
      own = pl.ds(part * TILE, TILE)
      found = None
      for g in range(self.shared):
        one = hopper_tiles.load(
          self.refs["q"].at[self.row, self.head * stride + g, own],
          _NUMBERS,
        )
        one = hopper_tiles.repeat(one, 1, shape, ROWS)
        found = one if found is None else jnp.where(query == g, one, found)
      values = found, *weights(found, self.kind)
      targets = [self.s["q_s"].at[part]]
      targets += [self.s["weights_s"].at[i, part] for i in range(2)]
      for target, value in zip(targets, values):
        hopper_tiles.store(target, value.astype(jnp.bfloat16))
    plgpu.commit_smem()

  def attend(self, before, count, filled):
    """Attends to the listed pages.

    Args:
      before: Tiles that the ring has fetched until now.
      count: Pages.
      filled: Slots of these that are seen, from the first on.

    Returns:
      Maxima of the logits to base 2, sums of their exponentials, (8,), and for
      each part of a head the mixed values, (8, 64).
    """
    s, ring, most = self.s, self.ring, self.config.tiles
    tiles = lax.div(count + self.each - 1, jnp.int32(self.each))

    def fetch(n):
      base = lax.div(n, jnp.int32(2 * most)) * most
      size, place = jnp.minimum(tiles - base, most), n - 2 * base
      is_key = place < size
      tile = base + jnp.where(is_key, place, place - size)
      # In the place of a page behind the last one that one comes again.
      begins = [
        pl.multiple_of(
          s["pages_s"][jnp.clip(tile * self.each + i, 0, count - 1)]
          * self.page,
          self.page,
        )
        for i in range(self.each)
      ]
      for name, wanted in (("keys", is_key), ("values", ~is_key)):

        @pl.when((n < 2 * tiles) & wanted)
        def _(name=name):
          ring.fetch(before + n, self.refs[name], self.at, begins, self.page)

    pl.when(tiles > 0)(lambda: pl.loop(0, ring.stages)(fetch))
    fill = lambda shape, value, layout: plgpu.layout_cast(
      jnp.full(shape, value, jnp.float32), layout
    )
    start = (
      fill((QUERIES,), _UNSEEN, _QUERY),
      fill((QUERIES,), 0.0, _QUERY),
      *[fill((QUERIES, TILE), 0.0, ROWS)] * self.parts,
    )
    return lax.fori_loop(
      jnp.int32(0), lax.div(tiles + most - 1, jnp.int32(most)),
      lambda i, state: self.some_tiles(
        fetch, i * most, tiles, before, filled, state
      ),
      start,
    )  # fmt: skip

  def some_tiles(self, fetch, base, tiles, before, filled, state):
    """Attends to as many tiles as there is memory for, from `base` on."""
    s, ring = self.s, self.ring
    size, first = jnp.minimum(tiles - base, self.config.tiles), 2 * base
    sums_of_tile = plgpu.ACC((TILE, QUERIES), jnp.float32)

    @pl.loop(0, size)
    def _(i):
      slot = ring.wait(before + first + i)

      def logits(sums):
        for part in range(self.parts):
          plgpu.wgmma(sums, ring.tiles.at[slot, part], s["q_s"].at[part].T)
        plgpu.wgmma_wait(0)
        return sums[...]

      found = pl.run_scoped(logits, sums_of_tile) * self.scale
      fetch(first + i + ring.stages)
      target = s["scores_s"].at[i, :, pl.ds(0, TILE)]
      hopper_tiles.store(target.T, plgpu.layout_cast(found, SUMS))

    shape = QUERIES, TILE
    places = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ROWS)

    def seen(i):
      value = hopper_tiles.load(s["scores_s"].at[i, :, pl.ds(0, TILE)], ROWS)
      return jnp.where(places + (base + i) * TILE < filled, value, _UNSEEN)

    loop = lambda body, start: lax.fori_loop(jnp.int32(0), size, body, start)
    fill = lambda value: plgpu.layout_cast(
      jnp.full(shape, value, jnp.float32), ROWS
    )
    old, total, *mixed = state
    # Threads meet once, and not for every tile.
    most = loop(lambda i, most: jnp.maximum(most, seen(i)), fill(_UNSEEN))
    top = jnp.maximum(old, jnp.max(most, axis=1))
    wide = hopper_tiles.repeat(top, 0, shape, ROWS)

    def weigh(i, sums):
      shares = jnp.exp2(seen(i) - wide)
      hopper_tiles.store(s["shares_s"].at[i], shares.astype(jnp.bfloat16))
      return sums + shares

    smaller = jnp.exp2(old - top)
    total = total * smaller + jnp.sum(loop(weigh, fill(0.0)), axis=1)
    plgpu.commit_smem()

    def mix(*sums):
      @pl.loop(0, size)
      def _(i):
        n = first + size + i
        slot = ring.wait(before + n)
        for part, one in enumerate(sums):
          plgpu.wgmma(one, ring.tiles.at[slot, part].T, s["shares_s"].at[i].T)
        plgpu.wgmma_wait(0)
        fetch(n + ring.stages)

      return [one[...] for one in sums]

    smaller = hopper_tiles.repeat(smaller, 0, shape, ROWS)
    more = pl.run_scoped(mix, *[sums_of_tile] * self.parts)
    target = s["mixed_s"].at[:, pl.ds(0, TILE)]
    for part, one in enumerate(more):
      hopper_tiles.store(target.T, plgpu.layout_cast(one, SUMS))
      mixed[part] = mixed[part] * smaller + hopper_tiles.load(target, ROWS)
    return top, total, *mixed

  def merge(self):
    """Merges what the cluster found, each query in one of its blocks."""
    read = lambda name, i, g: self.refs[name][self.row, self.head, i, g]
    for g in range(self.shared):

      @pl.when(self.split == g % self.splits)
      def _(g=g):
        tops = [read("most", i, g) for i in range(self.splits)]
        totals = [read("total", i, g) for i in range(self.splits)]
        # Nothing of this waits for the maxima.
        mixed = [
          [
            hopper_tiles.load(
              self.refs["mixed"].at[
                self.row, self.head, i, g, pl.ds(part * TILE, TILE)
              ],
              _NUMBERS,
            )
            for i in range(self.splits)
          ]
          for part in range(self.parts)
        ]
        top = functools.reduce(jnp.maximum, tops)
        scales = [jnp.exp2(one - top) for one in tops]
        total = sum(a * b for a, b in zip(scales, totals))
        inverse = 1 / jnp.maximum(total, 1e-30)
        for part in range(self.parts):
          own = pl.ds(part * TILE, TILE)
          found = sum(a * b for a, b in zip(scales, mixed[part]))
          hopper_tiles.store(
            self.refs["out"].at[self.row, self.head * self.shared + g, own],
            (found * inverse).astype(jnp.bfloat16),
          )
