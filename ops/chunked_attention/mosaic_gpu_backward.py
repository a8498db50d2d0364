"""The gradients of `chunked_attention`: of queries, of chunk keys, of tokens.

Three kernels compute shares again from the log-sum-exps. With the softmax's
shares p_ij, s_ij = scale q_i . k_j and D_i = dout_i . out_i,

  dv_j = sum_i p_ij dout_i             ds_ij = p_ij (dout_i . v_j - D_i)
  dq_i = scale sum_j ds_ij k_j         dk_j  = scale sum_i ds_ij q_i

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


def _gradient_of_scores(own, across, own_line, factor, mask, interpret):
  """Shares and gradients of scores of a tile, in bfloat16.

  Args:
    own: Tiles in shared memory whose rows are the result's: (q, dout), or
      (k, v).
    across: Those whose rows are the result's columns.
    own_line: `line(name, columns of the result)` broadcasts the log-sum-exps
      "log" or the sums "dot".
    factor: Of scores, to base 2.
    mask: Of pairs that see each other, or None for all.
    interpret: Whether the kernel is interpreted.
  """
  shape = own[0].shape[0], across[0].shape[0]

  def body(add, read):
    add(0, own[0], across[0].T)
    add(1, own[1], across[1].T)
    exponents = read(0, 1) * factor - own_line("log", shape)
    if mask is not None:
      exponents = jnp.where(mask, exponents, -jnp.inf)
    shares = jnp.exp2(exponents)
    slopes = shares * (read(1, 0) - own_line("dot", shape))
    return shares.astype(own[0].dtype), slopes.astype(own[0].dtype)

  return warpgroups.products((shape, shape), body, interpret)


def _add(sums, pairs, interpret):
  """`sums` plus the products of pairs, one each."""

  def body(add, read):
    for i, pair in enumerate(pairs):
      add(i, *pair)
    return tuple(read(i, len(pairs) - 1 - i) for i in range(len(pairs)))

  return warpgroups.products(sums, body, interpret)


def of_queries(
  q, k, v, chunk_k, chunk_v, ends, seen_from, starts, log, dot, dout, *,
  window, scale, config, interpret,
) -> jax.Array:  # fmt: skip
  """Returns dq. The walk is that of the forward pass.

  Args:
    q: As in `mosaic_gpu_forward.attend`, as those up to `starts`.
    k: Alike.
    v: Alike.
    chunk_k: Alike.
    chunk_v: Alike.
    ends: Alike.
    seen_from: Alike.
    starts: Alike.
    log: (B, H, S) float32, log-sum-exps to base 2.
    dot: (B, H, S) float32, D.
    dout: (B, S, H, D) bfloat16.
    window: L.
    scale: Positive.
    config: A `tiles.Config`.
    interpret: False, or the parameters of the interpreter.
  """
  b, s, h, d = q.shape
  n = k.shape[2]
  workers, keys, stages = config.workers, config.keys, config.gradient_stages
  count = s // config.rows
  near = tiles.Near(config, window, s)
  span = spans.spans(
    *spans.bounds(seen_from, ends, starts, config.rows, keys, s),
    masked_first=starts is not None,
  )
  given = {} if starts is None else {"starts": starts, "ends": ends}

  def kernel(q_ref, dout_ref, k_ref, v_ref, of_k_ref, of_v_ref, log_ref,
             dot_ref, seen_ref, span_ref, *rest, **smem):  # fmt: skip
    given_refs, dq_ref = dict(zip(given, rest)), rest[len(given)]
    worker = lax.axis_index("worker")
    row, head = lax.axis_index("row"), lax.axis_index("head")
    block = count - 1 - lax.axis_index("block")
    of = lax.div(head, jnp.int32(h // n))
    own = [span_ref[row, block, i] for i in range(4)]
    begin = near.begin((block + 1) * workers - near.blocks)

    def load():
      for i in range(workers):
        lines = pl.ds((block * workers + i) * BLOCK, BLOCK)
        for ref, name in ((q_ref, "q"), (dout_ref, "dout")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, lines, head], smem[name].at[i], smem["begun"]
          )
      for i in range(near.blocks):
        lines = pl.ds((begin + i) * BLOCK, BLOCK)
        for ref, name in ((k_ref, "near_k"), (v_ref, "near_v")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, lines, of], smem[name].at[i], smem["begun"]
          )

      def fetch(i, slot):
        lines = pl.ds((own[0] + i) * keys, keys)
        for ref, name in ((of_k_ref, "k"), (of_v_ref, "v")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, lines, of], smem[name].at[slot], smem["loaded"].at[slot]
          )

      warpgroups.produce(fetch, own[3] - own[0], stages, smem["consumed"])

    def compute(q_s, dout_s):
      first = (block * workers + worker) * BLOCK
      lines = row, head, pl.ds(first, BLOCK)
      vectors = {
        "log": tiles.line(log_ref, lines, ROW),
        "dot": tiles.line(dot_ref, lines, ROW),
      }
      starts_I = None
      if given:
        starts_I = tiles.line(given_refs["starts"], lines[::2], ROW)
      of_line = lambda name, shape: rows(vectors[name], shape[1])

      def fold(dq_ID, k_s, v_s, mask):
        _, slopes_IJ = _gradient_of_scores(
          (q_s, dout_s), (k_s, v_s), of_line, scale * LOG2E, mask, interpret
        )
        return _add((dq_ID,), ((slopes_IJ, k_s),), interpret)[0]

      def near_step(piece, dq_ID):
        place = near.place(block * workers + worker - piece, begin)
        shape = BLOCK, BLOCK
        mask = tiles.near_mask(
          first + tiles.iota(shape, 0),
          first - piece * BLOCK + tiles.iota(shape, 1),
          window,
          None if starts_I is None else rows(starts_I, BLOCK),
        )
        near_s = smem["near_k"].at[place], smem["near_v"].at[place]
        return fold(dq_ID, *near_s, mask)

      def step(i, dq_ID, masked):
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(smem["loaded"].at[slot])
        mask = None
        if masked:
          own_lines = row, pl.ds((own[0] + i) * keys, keys)
          seen_J = tiles.line(seen_ref, own_lines, COLUMN)
          mask = columns(seen_J, BLOCK) <= first + tiles.iota((BLOCK, keys), 0)
          if given:
            ends_J = tiles.line(given_refs["ends"], own_lines, COLUMN)
            mask &= columns(ends_J, BLOCK) >= rows(starts_I, keys)
        dq_ID = fold(dq_ID, smem["k"].at[slot], smem["v"].at[slot], mask)
        plgpu.barrier_arrive(smem["consumed"].at[slot])
        return dq_ID

      plgpu.barrier_wait(smem["begun"])
      dq_ID = near.each(near_step, tiles.zeros(BLOCK, d))
      dq_ID = tiles.walk(own, step, dq_ID, first=bool(given), last=True)
      q_s[...] = (dq_ID * scale).astype(q.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_s, dq_ref.at[row, lines[2], head])
      plgpu.wait_smem_to_gmem(0)

    own_tiles = smem["q"].at[worker], smem["dout"].at[worker]
    warpgroups.divide(workers, worker, lambda: compute(*own_tiles), load)

  run = plgpu.kernel(
    kernel,
    out_type=warpgroups.struct(q.shape, q.dtype),
    scratch_types={
      "q": warpgroups.tile(workers, BLOCK, d),
      "dout": warpgroups.tile(workers, BLOCK, d),
      "near_k": warpgroups.tile(near.blocks, BLOCK, d),
      "near_v": warpgroups.tile(near.blocks, BLOCK, d),
      "k": warpgroups.tile(stages, keys, d),
      "v": warpgroups.tile(stages, keys, d),
      "begun": plgpu.Barrier(num_arrivals=2 * workers + 2 * near.blocks),
      "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      "consumed": plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
    },
    grid=(count, b, h),
    grid_names=("block", "row", "head"),
    num_threads=workers + 1,
    thread_name="worker",
    kernel_name="chunked_attention_bwd_queries",
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )
  return run(
    q, dout, k, v, chunk_k, chunk_v, log, dot, seen_from, span, *given.values()
  )


def of_chunks(
  q, chunk_k, chunk_v, ends, seen_from, starts, log, dot, dout, *,
  scale, config, interpret,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Returns the gradients of chunk_k and chunk_v, float32, of each query head.

  A thread block takes `config.rows` chunk keys of a head and walks over the
  queries that see any of them, or over one of `config.parts` shares of these.

  Args:
    q: As in `of_queries`, as all arrays.
    chunk_k: Alike.
    chunk_v: Alike.
    ends: Alike.
    seen_from: Alike.
    starts: Alike.
    log: Alike.
    dot: Alike.
    dout: Alike.
    scale: Positive.
    config: A `tiles.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (parts, B, M, H, D) each.
  """
  b, s, h, d = q.shape
  m, n = chunk_k.shape[1:3]
  workers, stages = config.workers, config.gradient_stages
  queries, parts = config.queries, config.parts
  seen, whole = spans.bounds(seen_from, ends, starts, queries, config.rows, s)
  span = spans.spans(
    seen.swapaxes(1, 2), whole.swapaxes(1, 2), masked_first=True
  )
  # Part by part, [begin, end) in equal shares.
  begin, end = span[..., :1], span[..., 3:]
  share = -(-(end - begin) // parts)
  places = begin + share * jnp.arange(parts + 1, dtype=jnp.int32)[None, None]
  span = jnp.clip(
    span[:, :, None],
    jnp.minimum(places, end)[:, :, :-1, None],
    jnp.minimum(places, end)[:, :, 1:, None],
  )
  given = {} if starts is None else {"starts": starts, "ends": ends}

  def kernel(q_ref, dout_ref, k_ref, v_ref, log_ref, dot_ref, seen_ref,
             span_ref, *rest, **smem):  # fmt: skip
    given_refs = dict(zip(given, rest))
    dk_ref, dv_ref = rest[len(given) :]
    worker = lax.axis_index("worker")
    part, row = lax.axis_index("part"), lax.axis_index("row")
    head, block = lax.axis_index("head"), lax.axis_index("block")
    of = lax.div(head, jnp.int32(h // n))
    own = [span_ref[row, block, part, i] for i in range(4)]

    def load():
      for i in range(workers):
        lines = pl.ds((block * workers + i) * BLOCK, BLOCK)
        for ref, name in ((k_ref, "k"), (v_ref, "v")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, lines, of], smem[name].at[i], smem["begun"]
          )

      def fetch(i, slot):
        lines = pl.ds((own[0] + i) * queries, queries)
        loaded = smem["loaded"].at[slot]
        for ref, name in ((q_ref, "q"), (dout_ref, "dout")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, lines, head], smem[name].at[slot], loaded
          )
        for ref, name in ((log_ref, "log"), (dot_ref, "dot")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, head, lines], smem[name].at[slot], loaded
          )

      warpgroups.produce(fetch, own[3] - own[0], stages, smem["consumed"])

    def compute(k_s, v_s):
      first = (block * workers + worker) * BLOCK
      keys = row, pl.ds(first, BLOCK)
      seen_J = tiles.line(seen_ref, keys, ROW)
      ends_J = tiles.line(given_refs["ends"], keys, ROW) if given else None

      def step(i, carry, masked):
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(smem["loaded"].at[slot])
        mask = None
        if masked:
          token = (own[0] + i) * queries
          shape = BLOCK, queries
          mask = rows(seen_J, queries) <= token + tiles.iota(shape, 1)
          if given:
            lines = row, pl.ds(token, queries)
            starts_I = tiles.line(given_refs["starts"], lines, COLUMN)
            mask &= rows(ends_J, queries) >= columns(starts_I, BLOCK)
        q_s, dout_s = smem["q"].at[slot], smem["dout"].at[slot]

        def of_line(name, shape):
          vector = plgpu.load(smem[name].at[slot], layout=COLUMN)
          return columns(vector, shape[0])

        shares_JI, slopes_JI = _gradient_of_scores(
          (k_s, v_s), (q_s, dout_s), of_line, scale * LOG2E, mask, interpret
        )
        carry = _add(carry, ((slopes_JI, q_s), (shares_JI, dout_s)), interpret)
        plgpu.barrier_arrive(smem["consumed"].at[slot])
        return carry

      plgpu.barrier_wait(smem["begun"])
      carry = tiles.zeros(BLOCK, d), tiles.zeros(BLOCK, d)
      dk_JD, dv_JD = tiles.walk(own, step, carry, first=True, last=bool(given))
      dk_ref[part, row, keys[1], head] = dk_JD * scale
      dv_ref[part, row, keys[1], head] = dv_JD

    own_tiles = smem["k"].at[worker], smem["v"].at[worker]
    warpgroups.divide(workers, worker, lambda: compute(*own_tiles), load)

  partial = warpgroups.struct((parts, b, m, h, d), jnp.float32)
  run = plgpu.kernel(
    kernel,
    out_type=(partial, partial),
    scratch_types={
      "k": warpgroups.tile(workers, BLOCK, d),
      "v": warpgroups.tile(workers, BLOCK, d),
      "q": warpgroups.tile(stages, queries, d),
      "dout": warpgroups.tile(stages, queries, d),
      "log": warpgroups.vector(stages, queries),
      "dot": warpgroups.vector(stages, queries),
      "begun": plgpu.Barrier(num_arrivals=2 * workers),
      "loaded": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
      "consumed": plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
    },
    grid=(m // config.rows, parts, b, h),
    grid_names=("block", "part", "row", "head"),
    num_threads=workers + 1,
    thread_name="worker",
    kernel_name="chunked_attention_bwd_chunks",
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )
  return run(
    q, dout, chunk_k, chunk_v, log, dot, seen_from, span, *given.values()
  )


def of_tokens(
  q, k, v, starts, log, dot, dout, *, window, scale, config, interpret
) -> tuple[jax.Array, jax.Array]:
  """Returns what k and v get through the window, bfloat16, of each query head.

  A thread block takes `config.rows` tokens of a head and the queries that see
  them.

  Args:
    q: As in `of_queries`, as all arrays.
    k: Alike.
    v: Alike.
    starts: Alike.
    log: Alike.
    dot: Alike.
    dout: Alike.
    window: L.
    scale: Positive.
    config: A `tiles.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (B, S, H, D) each.
  """
  b, s, h, d = q.shape
  n = k.shape[2]
  workers = config.workers
  near = tiles.Near(config, window, s)
  given = {} if starts is None else {"starts": starts}

  def kernel(q_ref, dout_ref, k_ref, v_ref, log_ref, dot_ref, *rest, **smem):
    dk_ref, dv_ref = rest[len(given) :]
    worker = lax.axis_index("worker")
    row, head = lax.axis_index("row"), lax.axis_index("head")
    block = lax.axis_index("block") * workers
    of = lax.div(head, jnp.int32(h // n))
    begin = near.begin(block)
    own = block + worker
    k_s, v_s = smem["k"].at[worker], smem["v"].at[worker]
    keys = pl.ds(own * BLOCK, BLOCK)

    @pl.when(worker == 0)
    def _():
      for i in range(workers):
        lines = pl.ds((block + i) * BLOCK, BLOCK)
        for ref, name in ((k_ref, "k"), (v_ref, "v")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, lines, of], smem[name].at[i], smem["begun"]
          )
      for i in range(near.blocks):
        lines = pl.ds((begin + i) * BLOCK, BLOCK)
        for ref, name in ((q_ref, "q"), (dout_ref, "dout")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, lines, head], smem[name].at[i], smem["begun"]
          )
        for ref, name in ((log_ref, "log"), (dot_ref, "dot")):
          plgpu.copy_gmem_to_smem(
            ref.at[row, head, lines], smem[name].at[i], smem["begun"]
          )

    plgpu.barrier_wait(smem["begun"])

    def step(piece, carry):
      place = near.place(own + piece, begin)
      shape = BLOCK, BLOCK
      queries = (own + piece) * BLOCK + tiles.iota(shape, 1)
      starts_I = None
      if given:
        # Beyond the row, which the mask hides, any line will do.
        at = jnp.minimum(own + piece, near.total - 1) * BLOCK
        starts_I = tiles.line(rest[0], (row, pl.ds(at, BLOCK)), COLUMN)
        starts_I = columns(starts_I, BLOCK)
      mask = tiles.near_mask(
        queries, own * BLOCK + tiles.iota(shape, 0), window, starts_I
      )
      q_s, dout_s = smem["q"].at[place], smem["dout"].at[place]

      def of_line(name, shape):
        vector = plgpu.load(smem[name].at[place], layout=COLUMN)
        return columns(vector, shape[0])

      shares_JI, slopes_JI = _gradient_of_scores(
        (k_s, v_s), (q_s, dout_s), of_line, scale * LOG2E,
        mask & (queries < s), interpret,
      )  # fmt: skip
      return _add(carry, ((slopes_JI, q_s), (shares_JI, dout_s)), interpret)

    carry = tiles.zeros(BLOCK, d), tiles.zeros(BLOCK, d)
    dk_JD, dv_JD = near.each(step, carry)
    k_s[...] = (dk_JD * scale).astype(q.dtype)
    v_s[...] = dv_JD.astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_s, dk_ref.at[row, keys, head])
    plgpu.copy_smem_to_gmem(v_s, dv_ref.at[row, keys, head])
    plgpu.wait_smem_to_gmem(0)

  result = warpgroups.struct(q.shape, q.dtype)
  run = plgpu.kernel(
    kernel,
    out_type=(result, result),
    scratch_types={
      "k": warpgroups.tile(workers, BLOCK, d),
      "v": warpgroups.tile(workers, BLOCK, d),
      "q": warpgroups.tile(near.blocks, BLOCK, d),
      "dout": warpgroups.tile(near.blocks, BLOCK, d),
      "log": warpgroups.vector(near.blocks, BLOCK),
      "dot": warpgroups.vector(near.blocks, BLOCK),
      "begun": plgpu.Barrier(num_arrivals=2 * workers + 4 * near.blocks),
    },
    grid=(s // config.rows, b, h),
    grid_names=("block", "row", "head"),
    num_threads=workers,
    thread_name="worker",
    kernel_name="chunked_attention_bwd_tokens",
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
  )
  return run(q, dout, k, v, log, dot, *given.values())
