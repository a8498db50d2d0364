"""The forward kernel of `chunked_attention`.

Letters: I queries and J keys of a tile, D channels of a head.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_warpgroups as warpgroups
from ops.chunked_attention import mosaic_gpu_tiles as tiles
from ops.chunked_attention import spans
from ops.chunked_attention.mosaic_gpu_tiles import BLOCK, LOG2E
from ops.hopper_warpgroups import COLUMN, ROW, columns, rows


def attend(
  q, k, v, chunk_k, chunk_v, ends, seen_from, starts, *,
  window, scale, config, interpret,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Returns the outputs, and the log-sum-exp of each query to base 2.

  A thread block takes `config.rows` queries of a head. It holds the tokens
  around them and walks over the tiles of chunk keys that any of them sees; the
  tiles that all of them see whole need no mask. Softmax goes along as in
  FlashAttention, over both kinds of keys, which is what merging two branches
  by their log-sum-exp comes to.

  Args:
    q: (B, S, H, D) bfloat16, S a multiple of `config.rows`.
    k: (B, S, N, D).
    v: (B, S, N, D).
    chunk_k: (B, M, N, D), M a multiple of `config.keys`.
    chunk_v: (B, M, N, D).
    ends: (B, M) int32.
    seen_from: (B, M) int32.
    starts: (B, S) int32, or None.
    window: L.
    scale: Positive.
    config: A `tiles.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (B, S, H, D) bfloat16, and (B, H, S) float32.
  """
  b, s, h, d = q.shape
  n = k.shape[2]
  workers, keys, stages = config.workers, config.keys, config.stages
  count = s // config.rows
  near = tiles.Near(config, window, s)
  span = spans.spans(
    *spans.bounds(seen_from, ends, starts, config.rows, keys, s),
    masked_first=starts is not None,
  )
  given = {} if starts is None else {"starts": starts, "ends": ends}
  in_turns = config.in_turns and workers == 2 and not interpret
  factor = scale * LOG2E

  def kernel(q_ref, k_ref, v_ref, of_k_ref, of_v_ref, seen_ref, span_ref, *rest,
             **smem):  # fmt: skip
    given_refs = dict(zip(given, rest))
    out_ref, log_ref = rest[len(given) :]
    worker = lax.axis_index("worker")
    row, head = lax.axis_index("row"), lax.axis_index("head")
    # The last queries see most chunks, so they begin first.
    block = count - 1 - lax.axis_index("block")
    of = lax.div(head, jnp.int32(h // n))
    own = [span_ref[row, block, i] for i in range(4)]
    begin = near.begin((block + 1) * workers - near.blocks)

    def fetch(i, slot):
      lines = pl.ds((own[0] + i) * keys, keys)
      for ref, name in ((of_k_ref, "k"), (of_v_ref, "v")):
        plgpu.copy_gmem_to_smem(
          ref.at[row, lines, of],
          smem[name].at[slot],
          smem[f"{name}_loaded"].at[slot],
        )

    def load():
      held = lambda i: pl.ds((begin + i) * BLOCK, BLOCK)
      for i in range(workers):
        plgpu.copy_gmem_to_smem(
          q_ref.at[row, pl.ds((block * workers + i) * BLOCK, BLOCK), head],
          smem["q"].at[i],
          smem["begun"],
        )
      for i in range(near.blocks):
        for ref, name in ((k_ref, "near_k"), (v_ref, "near_v")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, held(i), of], smem[name].at[i], smem["begun"]
          )
      warpgroups.produce(
        fetch, own[3] - own[0], stages, smem["k_consumed"], smem["v_consumed"]
      )

    def turn():
      if in_turns:
        plgpu.barrier_arrive(smem["turn"])
        plgpu.barrier_wait(smem["turn"])

    def compute(q_s, log_s):
      first = (block * workers + worker) * BLOCK
      shape = BLOCK, BLOCK
      queries = first + tiles.iota((BLOCK, keys), 0)
      starts_I = None
      if given:
        starts_I = tiles.line(
          given_refs["starts"], (row, pl.ds(first, BLOCK)), ROW
        )

      def scores(k_s, wide, then=lambda: None):
        def body(add, read):
          add(0, q_s, k_s.T)
          then()
          return read(0, 0)

        return warpgroups.products(((BLOCK, wide),), body, interpret)

      def fold(scores_IJ, most_I, total_I):
        """Shares of the new keys, and of what was summed up."""
        higher_I = jnp.maximum(most_I, scores_IJ.max(axis=1) * factor)
        wide = scores_IJ.shape[1]
        shares_IJ = jnp.exp2(scores_IJ * factor - rows(higher_I, wide))
        kept_I = jnp.exp2(most_I - higher_I)
        total_I = total_I * kept_I + shares_IJ.sum(axis=1)
        return shares_IJ.astype(q.dtype), kept_I, higher_I, total_I

      def mix(sums_ID, shares_IJ, v_s):
        def body(add, read):
          add(0, shares_IJ, v_s)
          return read(0, 0)

        return warpgroups.products((sums_ID,), body, interpret)

      def near_step(piece, carry):
        sums_ID, most_I, total_I = carry
        token = first - piece * BLOCK
        place = near.place(block * workers + worker - piece, begin)
        scores_IJ = scores(smem["near_k"].at[place], BLOCK)
        mask = tiles.near_mask(
          first + tiles.iota(shape, 0),
          token + tiles.iota(shape, 1),
          window,
          None if starts_I is None else rows(starts_I, BLOCK),
        )
        scores_IJ = jnp.where(mask, scores_IJ, -jnp.inf)
        shares_IJ, kept_I, most_I, total_I = fold(scores_IJ, most_I, total_I)
        sums_ID = sums_ID * rows(kept_I, d)
        sums_ID = mix(sums_ID, shares_IJ, smem["near_v"].at[place])
        return sums_ID, most_I, total_I

      def step(i, carry, masked):
        sums_ID, most_I, total_I = carry
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(smem["k_loaded"].at[slot])
        scores_IJ = scores(smem["k"].at[slot], keys, turn)
        plgpu.barrier_arrive(smem["k_consumed"].at[slot])
        if masked:
          lines = row, pl.ds((own[0] + i) * keys, keys)
          seen_J = tiles.line(seen_ref, lines, COLUMN)
          mask = columns(seen_J, BLOCK) <= queries
          if given:
            ends_J = tiles.line(given_refs["ends"], lines, COLUMN)
            mask &= columns(ends_J, BLOCK) >= rows(starts_I, keys)
          scores_IJ = jnp.where(mask, scores_IJ, -jnp.inf)
        shares_IJ, kept_I, most_I, total_I = fold(scores_IJ, most_I, total_I)
        sums_ID = sums_ID * rows(kept_I, d)
        # Exponentials end before the other warpgroup takes its turn at them.
        sums_ID, total_I, most_I, shares_IJ = lax.optimization_barrier(
          (sums_ID, total_I, most_I, shares_IJ)
        )
        if in_turns:
          plgpu.barrier_arrive(smem["turn"])
        plgpu.barrier_wait(smem["v_loaded"].at[slot])
        if in_turns:
          plgpu.barrier_wait(smem["turn"])
        sums_ID = mix(sums_ID, shares_IJ, smem["v"].at[slot])
        plgpu.barrier_arrive(smem["v_consumed"].at[slot])
        return sums_ID, most_I, total_I

      plgpu.barrier_wait(smem["begun"])
      constant = lambda x: plgpu.layout_cast(
        jnp.full((BLOCK,), x, jnp.float32), ROW
      )
      carry = (
        tiles.zeros(BLOCK, d),
        constant(jnp.finfo(jnp.float32).min),
        constant(0.0),
      )
      carry = near.each(near_step, carry)
      if in_turns:
        pl.when(worker == 1)(turn)
      carry = tiles.walk(own, step, carry, first=bool(given), last=True)
      if in_turns:
        pl.when(worker == 0)(turn)
      sums_ID, most_I, total_I = carry
      q_s[...] = (sums_ID / rows(total_I, d)).astype(q.dtype)
      log_s[...] = most_I + jnp.log2(total_I)
      plgpu.commit_smem()
      lines = pl.ds(first, BLOCK)
      plgpu.copy_smem_to_gmem(q_s, out_ref.at[row, lines, head])
      plgpu.copy_smem_to_gmem(log_s, log_ref.at[row, head, lines])
      plgpu.wait_smem_to_gmem(0)

    own_tiles = smem["q"].at[worker], smem["log"].at[worker]
    warpgroups.divide(workers, worker, lambda: compute(*own_tiles), load)

  ready = plgpu.Barrier(num_barriers=stages)
  consumed = plgpu.Barrier(num_arrivals=workers, num_barriers=stages)
  scratch = {
    "q": warpgroups.tile(workers, BLOCK, d),
    "near_k": warpgroups.tile(near.blocks, BLOCK, d),
    "near_v": warpgroups.tile(near.blocks, BLOCK, d),
    "k": warpgroups.tile(stages, keys, d),
    "v": warpgroups.tile(stages, keys, d),
    "log": warpgroups.vector(workers, BLOCK),
    "begun": plgpu.Barrier(num_arrivals=workers + 2 * near.blocks),
    "k_loaded": ready,
    "v_loaded": ready,
    "k_consumed": consumed,
    "v_consumed": consumed,
  }
  if in_turns:
    scratch["turn"] = plgpu.Barrier(num_arrivals=workers)
  run = plgpu.kernel(
    kernel,
    out_type=(
      warpgroups.struct(q.shape, q.dtype),
      warpgroups.struct((b, h, s), jnp.float32),
    ),
    scratch_types=scratch,
    grid=(count, b, h),
    grid_names=("block", "row", "head"),
    num_threads=workers + 1,
    thread_name="worker",
    kernel_name="chunked_attention_fwd",
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )
  return run(q, k, v, chunk_k, chunk_v, seen_from, span, *given.values())
