"""Gradients of `ssd` on Hopper: two walks over the states, then all chunks.

Letters: I and J tokens of a chunk, P channels of a head, N state size.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops.ssd import mosaic_gpu_decays, mosaic_gpu_states
from ops.ssd import mosaic_gpu_tiles as tiles
from ops.ssd.mosaic_gpu_tiles import CHUNK, COLUMN, ROW


def gradients(
  x, decays, B, C, initial, D, dy, dstate, *, config, interpret
) -> tuple:
  """Returns the gradients of x, log_decay, dt, B, C, initial and D.

  With E_IJ = (C_I . B_J) exp(cum_I - cum_J) dt_J (dy_I . x_J), the part of the
  loss that goes from token J to token I, the gradient of a log decay k of a
  chunk is the sum of the E_IJ with I >= k > J, of the paths from the state
  before the chunk to I >= k, of those from J < k to the state after it, and of
  those that cross the chunk.
  """
  walk = lambda u, v, start, **options: mosaic_gpu_states.scan(
    u, v, decays, start, **options, config=config, interpret=interpret
  )
  states, _ = walk(x, B, initial, last=False)
  dstates, dinitial = walk(
    dy, C, dstate, reverse=True, last=initial is not None
  )
  dx, dB, dC, ddt, sums, *skipped = chunk_gradients(
    x, dy, decays, B, C, states, dstates, D, config=config, interpret=interpret
  )
  dlog_decay = mosaic_gpu_decays.decay_gradients(sums, interpret=interpret)
  if config.splits > 1:
    dB, dC = (v.sum(0).astype(B.dtype) for v in (dB, dC))
  dD = None
  if skipped:
    dD = skipped[0].sum((0, 2, 3))[:, None]
  elif D is not None:
    # A product with batch axes here would not become one reduction.
    dD = (x.astype(jnp.float32) * dy.astype(jnp.float32)).sum((0, 1))
  return (
    dx,
    dlog_decay,
    ddt.reshape(dlog_decay.shape),
    dB,
    dC,
    None if initial is None else dinitial,
    dD,
  )


def chunk_gradients(
  x, dy, decays, B, C, states, dstates, D, *, config, interpret
) -> tuple[jax.Array, ...]:
  """Returns dx, dB, dC and the sums that the gradients of decays are made of.

  A thread block takes one chunk of a row and its share of a group's heads, one
  after the other. Its first warpgroup gathers what reaches a token I, its
  second what leaves a token J; a third one loads.

  Args:
    x: (B, L, H, P) bfloat16.
    dy: Like x.
    decays: (B, H, L / CHUNK, 3, CHUNK), see `mosaic_gpu_decays.chunk_decays`.
    B: (B, L, G, N).
    C: (B, L, G, N).
    states: State before each chunk, (B, L / CHUNK, H, P, N) bfloat16.
    dstates: Gradient of the state after each chunk, like states.
    D: (H, P) or (H, 1) float32, or None.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    dx, like x; dB and dC, like B, or of several splits (splits, B, L, G, N)
    float32 to be summed; ddt, (B, H, L / CHUNK, CHUNK) float32; and sums,
    (B, H, L / CHUNK, 4, CHUNK) float32. These are, for each token, what comes
    into it from before; for each channel, what crosses the chunk; for each
    token, what goes to later tokens of the chunk, and what goes out of it. With
    D of (H, 1) there is x . dy of each token too, like ddt.
  """
  b, length, h, p = x.shape
  g, n = B.shape[2:]
  stages = config.gradient_stages
  steps = h // g // config.splits
  one_skip = D is not None and D.shape[1] == 1
  many_skips = D is not None and not one_skip

  def kernel(x_ref, dy_ref, decays_ref, B_ref, C_ref, S_ref, R_ref, *rest, **s):
    D_ref, rest = (None, rest) if D is None else (rest[0], rest[1:])
    dx_ref, dB_ref, dC_ref, ddt_ref, sums_ref, *skipped_ref = rest
    worker = lax.axis_index("worker")
    row = lax.axis_index("row")
    chunk = lax.axis_index("chunk")
    group = lax.div(lax.axis_index("part"), jnp.int32(config.splits))
    split = lax.rem(lax.axis_index("part"), jnp.int32(config.splits))
    first = lax.axis_index("part") * steps
    tokens = pl.ds(chunk * CHUNK, CHUNK)

    def fetch(i, slot):
      head = first + i
      loaded = s["loaded"].at[slot]
      for ref, name in ((x_ref, "x"), (dy_ref, "dy")):
        plgpu.copy_gmem_to_smem(
          ref.at[row, tokens, head], s[name].at[slot], loaded
        )
      for ref, name in ((S_ref, "S"), (R_ref, "R")):
        plgpu.copy_gmem_to_smem(
          ref.at[row, chunk, head], s[name].at[slot], loaded
        )
      # One place of shared memory cannot be loaded in two layouts, so cum has
      # another behind the three lines.
      for lines, place in ((pl.ds(0, 3), pl.ds(0, 3)), (0, 3)):
        plgpu.copy_gmem_to_smem(
          decays_ref.at[row, head, chunk, lines],
          s["decays"].at[slot, place],
          loaded,
        )
      if many_skips:
        plgpu.copy_gmem_to_smem(D_ref.at[head], s["D"].at[slot], loaded)

    def store(name, head, vectors, *results):
      """Stores vectors; a result is `(ref, which of them, *lines of ref)`."""
      for k, vector in enumerate(vectors):
        s[name][k] = vector
      plgpu.commit_smem()
      for ref, lines, *place in results:
        plgpu.copy_smem_to_gmem(
          s[name].at[lines], ref.at[row, head, chunk, *place]
        )

    def dot(a_s, b_s):
      """a b^T of two tiles that stay."""

      def body(add, read):
        add(0, a_s, b_s.T)
        return read(0, 0)

      return tiles.products(((CHUNK, CHUNK),), body, interpret)

    def write(name, ref, gradient):
      """Writes dB or dC, a sum over this block's heads."""
      if config.splits > 1:
        ref[split, row, tokens, group] = gradient
        return
      s[name][...] = gradient.astype(ref.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(s[name], ref.at[row, tokens, group])
      plgpu.wait_smem_to_gmem(0)

    def gather():
      """dC, summed over heads."""
      plgpu.barrier_wait(s["shared"])
      scores_IJ = dot(s["C"], s["B"])
      i_IJ, j_IJ = tiles.token_ids()

      def step(i, dC_IN):
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(s["loaded"].at[slot])
        x_s, dy_s, S_s, R_s = (s[k].at[slot] for k in ("x", "dy", "S", "R"))
        cum_I = plgpu.load(s["decays"].at[slot, 0], layout=ROW)
        cum_dt_J = plgpu.load(s["decays"].at[slot, 1], layout=COLUMN)
        last = s["decays"][slot, 0, CHUNK - 1]

        def pairs(add, read):
          add(0, dy_s, x_s.T)
          add(1, s["C"], S_s.T)
          exponent_IJ = tiles.rows(cum_I, CHUNK) - tiles.columns(
            cum_dt_J, CHUNK
          )
          weights_IJ = read(0, 1) * tiles.masked_exp2(i_IJ >= j_IJ, exponent_IJ)
          paths_IJ = jnp.where(i_IJ > j_IJ, weights_IJ * scores_IJ, 0.0)
          dy_IP = tiles.load_tile(dy_s)
          from_state_I = (dy_IP * read(1, 0)).sum(1) * jnp.exp2(cum_I)
          dy_IP *= tiles.rows(jnp.exp2(cum_I), p)
          return (
            weights_IJ.astype(x.dtype),
            dy_IP.astype(x.dtype),
            paths_IJ.sum(1) + from_state_I,
          )

        weights_IJ, dy_IP, into_I = tiles.products(
          ((CHUNK, CHUNK), (CHUNK, p)), pairs, interpret
        )

        def sums(add, read):
          add(0, weights_IJ, s["B"])
          add(0, dy_IP, S_s)
          across_PN = tiles.load_tile(S_s) * tiles.load_tile(R_s)
          across_P = across_PN.sum(1) * jnp.exp2(last)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          store(
            "into", first + i, (into_I, across_P),
            (sums_ref, pl.ds(0, 2), pl.ds(0, 2)),
          )  # fmt: skip
          return read(0, 0)

        dC_IN = tiles.products((dC_IN,), sums, interpret)
        plgpu.barrier_arrive(s["consumed"].at[slot])
        return dC_IN

      dC_IN = plgpu.layout_cast(jnp.zeros((CHUNK, n), jnp.float32), tiles.TILE)
      dC_IN = lax.fori_loop(0, steps, step, dC_IN)
      plgpu.wait_smem_to_gmem(0)
      return dC_IN

    def scatter():
      """dB, summed over heads; writes dx."""
      plgpu.barrier_wait(s["shared"])
      scores_JI = dot(s["B"], s["C"])
      j_JI, i_JI = tiles.token_ids()

      def step(i, dB_JN):
        slot = lax.rem(i, jnp.int32(stages))
        skip = D_ref[first + i, 0] if one_skip else None
        plgpu.barrier_wait(s["loaded"].at[slot])
        x_s, dy_s, R_s = (s[k].at[slot] for k in ("x", "dy", "R"))
        decays_s = s["decays"].at[slot]
        cum_J = plgpu.load(decays_s.at[0], layout=ROW)
        cum_I = plgpu.load(decays_s.at[3], layout=COLUMN)
        dt_J = plgpu.load(decays_s.at[2], layout=ROW)
        last = s["decays"][slot, 0, CHUNK - 1]

        def pairs(add, read):
          add(0, x_s, dy_s.T)
          add(1, s["B"], R_s.T)
          exponent_JI = tiles.columns(cum_I, CHUNK) - tiles.rows(cum_J, CHUNK)
          pairs_JI = tiles.masked_exp2(i_JI >= j_JI, exponent_JI)
          mixed_JI = (scores_JI * pairs_JI).astype(x.dtype)
          weights_JI = read(0, 1) * pairs_JI
          paths_JI = weights_JI * scores_JI
          to_all_J = paths_JI.sum(1)
          to_later_J = jnp.where(i_JI > j_JI, paths_JI, 0.0).sum(1)
          weights_JI = (weights_JI * tiles.rows(dt_J, CHUNK)).astype(x.dtype)
          to_end_J = jnp.exp2(last - cum_J)
          x_JP = tiles.load_tile(x_s)
          du_JP = read(1, 0) * tiles.rows(to_end_J, p)
          to_state_J = (x_JP * du_JP).sum(1)
          x_JP = (x_JP * tiles.rows(to_end_J * dt_J, p)).astype(x.dtype)
          vectors = (
            to_later_J * dt_J, to_state_J * dt_J, to_all_J + to_state_J
          )  # fmt: skip
          return mixed_JI, weights_JI, x_JP, du_JP, vectors

        mixed_JI, weights_JI, x_JP, du_JP, vectors = tiles.products(
          ((CHUNK, CHUNK), (CHUNK, p)), pairs, interpret
        )

        def sums(add, read):
          add(0, mixed_JI, dy_s)
          add(1, weights_JI, s["C"])
          add(1, x_JP, R_s)
          dx_JP = read(0, 2) * tiles.rows(dt_J, p)
          results = [(sums_ref, pl.ds(0, 2), pl.ds(2, 2)), (ddt_ref, 2)]
          skipped = ()
          if one_skip:
            dy_JP = tiles.load_tile(dy_s)
            dx_JP += dy_JP * skip
            skipped = ((tiles.load_tile(x_s) * dy_JP).sum(1),)
            results.append((*skipped_ref, 3))
          elif many_skips:
            D_P = plgpu.load(s["D"].at[slot], layout=COLUMN)
            dx_JP += tiles.load_tile(dy_s) * tiles.columns(D_P, CHUNK)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          s["dx"][...] = dx_JP.astype(x.dtype)
          store("out", first + i, (*vectors, *skipped), *results)
          plgpu.copy_smem_to_gmem(s["dx"], dx_ref.at[row, tokens, first + i])
          return read(1, 0)

        dB_JN = tiles.products((du_JP, dB_JN), sums, interpret)
        plgpu.barrier_arrive(s["consumed"].at[slot])
        return dB_JN

      dB_JN = plgpu.layout_cast(jnp.zeros((CHUNK, n), jnp.float32), tiles.TILE)
      dB_JN = lax.fori_loop(0, steps, step, dB_JN)
      plgpu.wait_smem_to_gmem(0)
      return dB_JN

    @pl.when(worker == 0)
    def _():
      tiles.set_registers(2, computes=True)
      write("dC", dC_ref, gather())

    @pl.when(worker == 1)
    def _():
      tiles.set_registers(2, computes=True)
      write("dB", dB_ref, scatter())

    @pl.when(worker == 2)
    def _():
      tiles.set_registers(2, computes=False)
      for ref, name in ((B_ref, "B"), (C_ref, "C")):
        plgpu.copy_gmem_to_smem(
          ref.at[row, tokens, group], s[name], s["shared"]
        )
      tiles.produce(fetch, jnp.int32(steps), stages, s["consumed"])
      plgpu.barrier_wait(s["shared"])

  if config.splits == 1:
    partial = tiles.struct(B.shape, B.dtype)
  else:
    partial = tiles.struct((config.splits, *B.shape), jnp.float32)
  lines = lambda *count: tiles.struct(
    (*decays.shape[:3], *count, CHUNK), jnp.float32
  )
  run = plgpu.kernel(
    kernel,
    out_type=(
      tiles.struct(x.shape, x.dtype),
      partial,
      partial,
      lines(),
      lines(4),
      *([lines()] if one_skip else []),
    ),
    scratch_types={
      "B": tiles.tile(CHUNK, n),
      "C": tiles.tile(CHUNK, n),
      "dB": tiles.tile(CHUNK, n),
      "dC": tiles.tile(CHUNK, n),
      "x": tiles.tile(stages, CHUNK, p),
      "dy": tiles.tile(stages, CHUNK, p),
      "S": tiles.tile(stages, p, n),
      "R": tiles.tile(stages, p, n),
      "decays": tiles.vector(stages, 4, CHUNK),
      "D": tiles.vector(stages, p),
      "dx": tiles.tile(CHUNK, p),
      "into": tiles.vector(2, CHUNK),
      "out": tiles.vector(3 + one_skip, CHUNK),
      "shared": plgpu.Barrier(num_arrivals=2),
      "loaded": plgpu.Barrier(num_arrivals=6 + many_skips, num_barriers=stages),
      "consumed": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    },
    grid=(b, length // CHUNK, g * config.splits),
    grid_names=("row", "chunk", "part"),
    num_threads=3,
    thread_name="worker",
    kernel_name="ssd_bwd_chunks",
    compiler_params=config.compiler_params(),
    interpret=interpret,
  )
  operands = (x, dy, decays, B, C, states, dstates)
  return run(*operands, *([] if D is None else [D]))
