"""The second kernel of a layer: attention, split over the keys of a row.

A thread block takes some tiles of 64 slots of a row's key/value head. All its
scores lie in shared memory, so that values are weighted by exponentials that
need no correction later. Hopper's matrix unit takes 64 slots, or 64 of a head's
numbers, as the rows of a tile, and the head's queries as its columns, of which
there are eight, be the queries fewer. What blocks found is merged by XLA.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_tiles import ROWS, SUMS, TILE
from ops.mamba2_step import mosaic_gpu_product as product

NAME = "transformer_step_attend"
QUERIES = 8
# Finite, so that blocks without a slot are merged as nothing.
_UNSEEN = -1e30


def attend(
  layer, q, caches, lengths, *, shared, splits, stages, interpret
) -> jax.Array:
  """Returns the mixed heads of each row, (B, N, G K) bfloat16.

  Args:
    layer: (1,) int32.
    q: Rotated queries, eight a key/value head, (rows, heads, K) bfloat16, as
      `mosaic_gpu_qkv` makes them.
    caches: References to keys and values, (L, B, S, N, K), with the new ones.
    lengths: (B,) int32, slots that are filled, the new ones among them.
    shared: G, queries of a key/value head.
    splits: Blocks that share a row's head.
    stages: Tiles of keys or values in shared memory.
    interpret: False, or the parameters of the interpreter.
  """
  batch, slots, heads, size = caches[0].shape[1:]
  parts, most = size // TILE, -(-slots // (TILE * splits))
  transforms = plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128)
  tiles = lambda *shape: plgpu.SMEM(
    (*shape, TILE), jnp.bfloat16, transforms=transforms
  )

  def kernel(
    layer_ref, q_ref, lengths_ref, keys_ref, values_ref, mixed_ref, most_ref,
    total_ref, *, q_s, ring, scores_s, shares_s, mixed_s, q_loaded, loaded,
  ):  # fmt: skip
    split, head, row = (
      lax.axis_index(name) for name in ("split", "head", "row")
    )
    layer, length = layer_ref[0], lengths_ref[row]
    filled = jnp.minimum(
      lax.div(length + TILE - 1, jnp.int32(TILE)), jnp.int32(slots // TILE)
    )
    begin, end = (
      lax.div((split + i) * filled, jnp.int32(splits)) for i in range(2)
    )
    count = end - begin

    def copy(ref, tile, slot):
      own = pl.ds((begin + tile) * TILE, TILE)
      for part in range(parts):
        plgpu.copy_gmem_to_smem(
          ref.at[layer, row, own, head, pl.ds(part * TILE, TILE)],
          ring.at[slot, part],
          loaded.at[slot],
        )

    def fetch(i):
      slot = lax.rem(i, jnp.int32(stages))
      pl.when(i < count)(lambda: copy(keys_ref, i, slot))
      pl.when((i >= count) & (i < 2 * count))(
        lambda: copy(values_ref, i - count, slot)
      )

    for part in range(parts):
      plgpu.copy_gmem_to_smem(
        q_ref.at[row, pl.ds(head * QUERIES, QUERIES), pl.ds(part * TILE, TILE)],
        q_s.at[part],
        q_loaded,
      )

    @pl.loop(0, stages)
    def _(i):
      fetch(i)

    def arrived(i):
      slot = lax.rem(i, jnp.int32(stages))
      plgpu.barrier_wait(loaded.at[slot])
      return slot

    plgpu.barrier_wait(q_loaded)

    @pl.loop(0, count)
    def _(i):
      slot = arrived(i)

      def scores(sums):
        for part in range(parts):
          plgpu.wgmma(sums, ring.at[slot, part], q_s.at[part].T)
        plgpu.wgmma_wait(0)
        return sums[...]

      found = pl.run_scoped(scores, plgpu.ACC((TILE, QUERIES), jnp.float32))
      target = scores_s.at[i, :, pl.ds(0, TILE)]
      hopper_tiles.store(target.T, plgpu.layout_cast(found, SUMS))
      # All threads are through with the tile before.
      pl.when(i > 0)(lambda: fetch(i - 1 + stages))

    shape, vector = (QUERIES, TILE), ROWS.reduce(1)
    places = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ROWS)
    spread = lambda v: product.repeat(v, 0, shape, ROWS)

    def seen(i):
      value = hopper_tiles.load(scores_s.at[i, :, pl.ds(0, TILE)], ROWS)
      return jnp.where(places + (begin + i) * TILE < length, value, _UNSEEN)

    fill = lambda value: plgpu.layout_cast(
      jnp.full((QUERIES,), value, jnp.float32), vector
    )
    loop = lambda body, start: lax.fori_loop(jnp.int32(0), count, body, start)
    top = loop(
      lambda i, top: jnp.maximum(top, jnp.max(seen(i), axis=1)), fill(_UNSEEN)
    )

    def weigh(i, total):
      shares = jnp.exp2(seen(i) - spread(top))
      hopper_tiles.store(shares_s.at[i], shares.astype(jnp.bfloat16))
      return total + jnp.sum(shares, axis=1)

    total = loop(weigh, fill(0.0))
    plgpu.commit_smem()

    def mix(*sums):
      @pl.loop(0, count)
      def _(i):
        slot = arrived(i + count)
        for part, one in enumerate(sums):
          plgpu.wgmma(one, ring.at[slot, part].T, shares_s.at[i].T)
        plgpu.wgmma_wait(0)
        pl.when(i + count > 0)(lambda: fetch(i + count - 1 + stages))

      return [one[...] for one in sums]

    mixed = pl.run_scoped(
      mix, *[plgpu.ACC((TILE, QUERIES), jnp.float32)] * parts
    )
    for part, one in enumerate(mixed):
      target = mixed_s.at[:, pl.ds(0, TILE)]
      hopper_tiles.store(target.T, plgpu.layout_cast(one, SUMS))
      hopper_tiles.store(
        mixed_ref.at[row, head, split, :, pl.ds(part * TILE, TILE)],
        hopper_tiles.load(target, ROWS),
      )
    hopper_tiles.store(most_ref.at[row, head, split], top)
    hopper_tiles.store(total_ref.at[row, head, split], total)

  across = batch, heads, splits, QUERIES
  run = plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct((*across, size), jnp.float32),
      jax.ShapeDtypeStruct(across, jnp.float32),
      jax.ShapeDtypeStruct(across, jnp.float32),
    ),
    grid=(splits, heads, batch),
    grid_names=("split", "head", "row"),
    scratch_types={
      "q_s": tiles(parts, QUERIES),
      "ring": tiles(stages, parts, TILE),
      # Four more than needed let the threads of a warp store to all banks.
      "scores_s": plgpu.SMEM((most, QUERIES, TILE + 4), jnp.float32),
      "shares_s": tiles(most, QUERIES),
      "mixed_s": plgpu.SMEM((QUERIES, TILE + 4), jnp.float32),
      "q_loaded": plgpu.Barrier(num_arrivals=parts),
      "loaded": plgpu.Barrier(num_arrivals=parts, num_barriers=stages),
    },
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  found = run(layer, q, lengths, *caches)
  mixed, top, total = (one[:, :, :, :shared] for one in found)
  if splits > 1:
    weight = jnp.exp2(top - jnp.max(top, axis=2, keepdims=True))
    total = jnp.sum(weight * total, axis=2)
    mixed = jnp.sum(weight[..., None] * mixed, axis=2)
  else:
    mixed, total = mixed[:, :, 0], total[:, :, 0]
  mixed = (mixed / total[..., None]).astype(jnp.bfloat16)
  return mixed.reshape(batch, -1)
