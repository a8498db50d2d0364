"""The first kernel: scores of 64 pages of a row's key head a thread block.

Hopper's matrix unit takes pages as the rows of a tile and the eight queries of
a head as its columns. Pages behind the row's last token are not read.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_attention import QUERIES
from ops.hopper_tiles import ROWS, TILE
from ops.paged_sparse_attention.summary import weights

NAME = "paged_sparse_attention_scores"


def page_scores(
  layer, q, summary, lengths, *, shared, kind, page_size, room, interpret
) -> jax.Array:
  """Returns the scores of all pages, (B, N, room) float32.

  Those of a page behind the last one, and behind P, may be anything.

  Args:
    layer: (1,) int32.
    q: (B, N, 8, K) bfloat16.
    summary: Both parts, (L, B, P, N, K) bfloat16, of 64 pages at least.
    lengths: (B,) int32, slots that are filled.
    shared: Queries of a head that count, the first ones.
    kind: Of the summary.
    page_size: Slots of a page.
    room: Pages that the result has room for.
    interpret: False, or the parameters of the interpreter.
  """
  batch, pages, heads, size = summary[0].shape[1:]
  parts = size // TILE

  def kernel(layer_ref, q_ref, first_ref, second_ref, lengths_ref,
             scores_ref, *, weights_s, pages_s, loaded):  # fmt: skip
    tile, head, row = (lax.axis_index(name) for name in ("tile", "head", "row"))
    # The last tile begins earlier rather than to end behind the pages.
    begin = jnp.minimum(tile * TILE, pages - TILE)
    own = pl.ds(pl.multiple_of(begin, 8), TILE)

    @pl.when(tile * TILE * page_size < lengths_ref[row])
    def _():
      for part in range(parts):
        columns = pl.ds(part * TILE, TILE)
        for which, ref in enumerate((first_ref, second_ref)):
          plgpu.copy_gmem_to_smem(
            ref.at[layer_ref[0], row, own, head, columns],
            pages_s.at[which, part],
            loaded,
          )
      for part in range(parts):
        columns = pl.ds(part * TILE, TILE)
        q = hopper_tiles.load(q_ref.at[row, head, :, columns], ROWS)
        for which, weight in enumerate(weights(q, kind)):
          hopper_tiles.store(
            weights_s.at[which, part], weight.astype(jnp.bfloat16)
          )
      plgpu.commit_smem()
      plgpu.barrier_wait(loaded)

      def products(sums):
        for which in range(2):
          for part in range(parts):
            plgpu.wgmma(
              sums, pages_s.at[which, part], weights_s.at[which, part].T
            )
        plgpu.wgmma_wait(0)
        return sums[...]

      found = pl.run_scoped(products, plgpu.ACC((TILE, QUERIES), jnp.float32))
      query = plgpu.broadcasted_iota(
        jnp.int32, found.shape, 1, layout=plgpu.Layout.WGMMA
      )
      found = jnp.where(query < shared, found, -jnp.inf)
      hopper_tiles.store(scores_ref.at[row, head, own], jnp.max(found, axis=1))

  tiles = lambda *shape: hopper_tiles.swizzled(
    (2, parts, *shape, TILE), jnp.bfloat16, 16
  )
  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((batch, heads, room), jnp.float32),
    grid=(-(-pages // TILE), heads, batch),
    grid_names=("tile", "head", "row"),
    scratch_types={
      "weights_s": tiles(QUERIES),
      "pages_s": tiles(TILE),
      "loaded": plgpu.Barrier(num_arrivals=2 * parts),
    },
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  return run(layer, q, *summary, lengths)
