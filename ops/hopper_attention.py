"""Attention of a few queries to tiles of keys, in a thread block of Hopper.

All scores lie in shared memory, so that values are weighted by exponentials
that need no correction later. Hopper's matrix unit takes 64 slots, or 64 of a
head's numbers, as the rows of a tile, and the queries of a key/value head as
its columns, of which there are eight, be the queries fewer.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper_tiles import ROWS, SUMS, TILE

QUERIES = 8
# Bytes of shared memory that the scores and shares of a tile take.
OF_TILE = QUERIES * (4 * (TILE + 4) + 2 * TILE)
# Finite, so that blocks without a slot are merged as nothing.
_UNSEEN = -1e30
# Blocks of a head that `merged` takes one by one, at most.
_ONE_BY_ONE = 48


def scratch(*, parts: int, tiles: int, stages: int, copies: int = 1) -> dict:
  """Shared memory and barriers of `attend`, by name.

  Args:
    parts: Of 64 of a head's numbers.
    tiles: Tiles of keys that a block takes, at most.
    stages: Tiles of keys or values that are there at a time.
    copies: Copies that make a part of a tile.
  """
  blocks = lambda *shape: hopper_tiles.swizzled(
    (*shape, TILE), jnp.bfloat16, 16
  )
  return {
    "q_s": blocks(parts, QUERIES),
    "ring": blocks(stages, parts, TILE),
    # Four more than needed let the threads of a warp store to all banks.
    "scores_s": plgpu.SMEM((tiles, QUERIES, TILE + 4), jnp.float32),
    "shares_s": blocks(tiles, QUERIES),
    "mixed_s": plgpu.SMEM((QUERIES, TILE + 4), jnp.float32),
    "q_loaded": plgpu.Barrier(num_arrivals=parts),
    "loaded": plgpu.Barrier(num_arrivals=parts * copies, num_barriers=stages),
  }


def outputs(blocks: tuple[int, ...], size: int) -> tuple:
  """Types of what blocks of a grid find: see `attend` and `merged`.

  Args:
    blocks: (B, N, splits).
    size: K.
  """
  across = *blocks, QUERIES
  return tuple(
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((*across, size), across, across)
  )


def fetch_queries(q_ref: Any, s: dict) -> None:
  """Begins to copy the queries (8, K) of the block; `attend` waits for them."""
  for part in range(s["q_s"].shape[0]):
    plgpu.copy_gmem_to_smem(
      q_ref.at[:, pl.ds(part * TILE, TILE)], s["q_s"].at[part], s["q_loaded"]
    )


def attend(
  copy: Callable[[Any, jax.Array, jax.Array], None],
  keys_ref: Any,
  values_ref: Any,
  finish: Callable[[list[jax.Array], jax.Array, jax.Array], None],
  s: dict,
  *,
  count: jax.Array,
  seen: Callable[[jax.Array], jax.Array],
  scale: float | None = None,
) -> None:
  """Attends to tiles of 64 slots, whose queries `fetch_queries` fetches.

  Args:
    copy: Called with keys or values, the number of a tile and its place in
      `s["ring"]`: begins to copy it, and tells `s["loaded"]` of that place.
    keys_ref: Handed to `copy`.
    values_ref: Alike.
    finish: Called with what was found: mixed values by parts, (8, 64) in the
      layout ROWS, maxima of the logits to base 2 and sums of their
      exponentials, (8,). See `write` and `merge`.
    s: What `scratch` names.
    count: int32 scalar, of tiles.
    seen: Called with the number of a tile: slots of it that are seen, from its
      first one on, an int32 scalar; be it less than 0 or more than 64.
    scale: Of logits to base 2; None where the queries have it.
  """
  q_s, ring, scores_s, shares_s = (
    s[name] for name in ("q_s", "ring", "scores_s", "shares_s")
  )
  stages, parts = ring.shape[:2]
  sums_of_tile = plgpu.ACC((TILE, QUERIES), jnp.float32)

  def fetch(i):
    slot = lax.rem(i, jnp.int32(stages))
    pl.when(i < count)(lambda: copy(keys_ref, i, slot))
    pl.when((i >= count) & (i < 2 * count))(
      lambda: copy(values_ref, i - count, slot)
    )

  def arrived(i):
    slot = lax.rem(i, jnp.int32(stages))
    plgpu.barrier_wait(s["loaded"].at[slot])
    return slot

  @pl.loop(0, stages)
  def _(i):
    fetch(i)

  plgpu.barrier_wait(s["q_loaded"])

  @pl.loop(0, count)
  def _(i):
    slot = arrived(i)

    def logits(sums):
      for part in range(parts):
        plgpu.wgmma(sums, ring.at[slot, part], q_s.at[part].T)
      plgpu.wgmma_wait(0)
      return sums[...]

    found = pl.run_scoped(logits, sums_of_tile)
    if scale is not None:
      found *= scale
    target = scores_s.at[i, :, pl.ds(0, TILE)]
    hopper_tiles.store(target.T, plgpu.layout_cast(found, SUMS))
    # All threads are through with the tile before.
    pl.when(i > 0)(lambda: fetch(i - 1 + stages))

  shape, vector = (QUERIES, TILE), ROWS.reduce(1)
  places = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ROWS)

  def masked(i):
    value = hopper_tiles.load(scores_s.at[i, :, pl.ds(0, TILE)], ROWS)
    return jnp.where(places < seen(i), value, _UNSEEN)

  fill = lambda value: plgpu.layout_cast(
    jnp.full((QUERIES,), value, jnp.float32), vector
  )
  loop = lambda body, start: lax.fori_loop(jnp.int32(0), count, body, start)
  top = loop(
    lambda i, top: jnp.maximum(top, jnp.max(masked(i), axis=1)), fill(_UNSEEN)
  )

  def weigh(i, total):
    shares = jnp.exp2(masked(i) - hopper_tiles.repeat(top, 0, shape, ROWS))
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

  found = []
  for one in pl.run_scoped(mix, *[sums_of_tile] * parts):
    target = s["mixed_s"].at[:, pl.ds(0, TILE)]
    hopper_tiles.store(target.T, plgpu.layout_cast(one, SUMS))
    found.append(hopper_tiles.load(target, ROWS))
  finish(found, top, total)


def write(
  outs: tuple[Any, Any, Any], mixed: list, top: jax.Array, total: jax.Array
) -> None:
  """Writes what a block found.

  Args:
    outs: References of the types of `outputs`.
    mixed: What `attend` hands to `finish`: values by parts, (8, 64) float32.
    top: Maxima, (8,).
    total: Sums, (8,).
  """
  mixed_ref, most_ref, total_ref = outs
  for part, one in enumerate(mixed):
    hopper_tiles.store(mixed_ref.at[:, pl.ds(part * TILE, TILE)], one)
  hopper_tiles.store(most_ref, top)
  hopper_tiles.store(total_ref, total)


def shared_by(cluster: int, parts: int, name: str) -> tuple[dict, dict]:
  """A cluster of blocks that share the slots of a head: see `merge`.

  Args:
    cluster: Blocks.
    parts: Of 64 of a head's numbers.
    name: Of the cluster's axis.

  Returns:
    Shared memory by name, and arguments of `plgpu.kernel`.
  """
  tiles = parts + 2
  scratch = {
    "others": plgpu.SMEM(
      (cluster - 1, tiles, QUERIES, TILE),
      jnp.float32,
      transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
    ),
    "arrived": plgpu.Barrier(num_arrivals=(cluster - 1) * tiles),
    "merged_s": plgpu.SMEM((QUERIES, parts * TILE), jnp.bfloat16),
  }
  return scratch, {"cluster": (cluster,), "cluster_names": (name,)}


def merge(
  target: Any, s: dict, name: str, mixed: list, top: jax.Array, total: jax.Array
) -> None:
  """Writes what the blocks of a cluster found, as `merged` does.

  Args:
    target: Reference to the mixed heads in memory, (G, K) bfloat16.
    s: What `shared_by` names.
    name: Of the cluster's axis.
    mixed: What `attend` hands to `finish`: values by parts, (8, 64) float32.
    top: Maxima, (8,).
    total: Sums, (8,).
  """
  shape, others = (QUERIES, TILE), s["others"]
  member, parts = lax.axis_index(name), len(mixed)
  wide = lambda vector: hopper_tiles.repeat(vector, 0, shape, ROWS)
  tiles = [*mixed, wide(top), wide(total)]

  @pl.when(member > 0)
  def _():
    for k, tile in enumerate(tiles):
      plgpu.async_store_smem(
        tile, others.at[member - 1, k], s["arrived"],
        cluster_idx=jnp.int32(0), cluster_dim=name, optimized=False,
      )  # fmt: skip

  @pl.when(member == 0)
  def _():
    plgpu.barrier_wait(s["arrived"])
    load = lambda i, k: hopper_tiles.load(others.at[i, k], ROWS)
    count = others.shape[0]
    most = tiles[parts]
    for i in range(count):
      most = jnp.maximum(most, load(i, parts))
    weight = jnp.exp2(tiles[parts] - most)
    sums = [weight * tile for k, tile in enumerate(tiles) if k != parts]
    for i in range(count):
      weight = jnp.exp2(load(i, parts) - most)
      rest = [load(i, k) for k in range(parts + 2) if k != parts]
      sums = [one + weight * other for one, other in zip(sums, rest)]
    *found, total = sums
    for part, one in enumerate(found):
      one = (one / jnp.maximum(total, 1e-30)).astype(jnp.bfloat16)
      own = s["merged_s"].at[:, pl.ds(part * TILE, TILE)]
      hopper_tiles.store(own, one)
    plgpu.commit_smem()
    rows = pl.ds(0, target.shape[0])
    plgpu.copy_smem_to_gmem(s["merged_s"].at[rows], target)
    plgpu.wait_smem_to_gmem(0)


def merged(mixed: jax.Array, top: jax.Array, total: jax.Array) -> jax.Array:
  """What blocks that share the keys of a head found, as one: (B, N, G, K).

  Args:
    mixed: (B, N, splits, G, K) float32, of `attend`.
    top: (B, N, splits, G).
    total: (B, N, splits, G). Where all of it is 0, the result is 0.
  """
  splits = top.shape[2]
  if splits > _ONE_BY_ONE:
    weight = jnp.exp2(top - jnp.max(top, axis=2, keepdims=True))
    total = jnp.maximum(jnp.sum(weight * total, axis=2), 1e-30)
    return jnp.sum(weight[..., None] * mixed, axis=2) / total[..., None]
  # XLA gives each reduction a kernel of its own; what is added one by one
  # becomes a single kernel.
  add = functools.partial(functools.reduce, operator.add)
  most = functools.reduce(jnp.maximum, [top[:, :, i] for i in range(splits)])
  weights = [jnp.exp2(top[:, :, i] - most) for i in range(splits)]
  total = add([w * total[:, :, i] for i, w in enumerate(weights)])
  mixed = add([w[..., None] * mixed[:, :, i] for i, w in enumerate(weights)])
  return mixed / jnp.maximum(total, 1e-30)[..., None]
