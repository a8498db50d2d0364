"""The fused forward kernel of `ssd`: each head walks over its chunks.

Letters: I and J tokens of a chunk, P channels of a head, N state size.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops.ssd import mosaic_gpu_tiles as tiles
from ops.ssd.mosaic_gpu_tiles import CHUNK, COLUMN, ROW, TILE


def scan(x, decays, B, C, initial, D, *, config, interpret):
  """Returns y and the last state.

  A thread block takes `config.heads` heads of a group in one segment of a row,
  a warpgroup each, and loads chunks of x, B and C some stages ahead. The state
  stays in the registers of its warpgroup, in float32:

    y_I = exp(cum_I) C_I S^T + sum_J (C_I . B_J) exp(cum_I - cum_J) dt_J x_J
    S <- exp(cum) S + sum_J exp(cum - cum_J) dt_J x_J B_J^T

  Args:
    x: (B, L, H, CHANNELS) bfloat16, whole chunks.
    decays: (B, H, L / CHUNK, 3, CHUNK), see `mosaic_gpu_decays.chunk_decays`.
    B: (B, L, G, N).
    C: (B, L, G, N).
    initial: State at the start of each of K segments, (B, K, H, P, N) float32,
      or one of zeros where it is None.
    D: (H, P) or (H, 1) float32, or None.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.
  """
  b, length, h, p = x.shape
  g, n = B.shape[2:]
  heads, stages = config.heads, config.stages
  chunks = length // CHUNK
  segments = 1 if initial is None else initial.shape[1]
  share = -(-chunks // segments)
  one_skip = D is not None and D.shape[1] == 1
  given = {"initial": initial, "D": D}
  given = {name: value for name, value in given.items() if value is not None}

  def kernel(x_ref, decays_ref, B_ref, C_ref, *rest, **s):
    given_refs = dict(zip(given, rest))
    y_ref, state_ref = rest[len(given) :]
    worker = lax.axis_index("worker")
    row = lax.axis_index("row")
    segment = lax.axis_index("segment")
    head = lax.axis_index("heads") * heads
    first = segment * share
    steps = jnp.minimum(share, chunks - first)

    def fetch(chunk, slot, group):
      tokens = pl.ds(chunk * CHUNK, CHUNK)
      loaded = s["loaded"].at[slot]
      for ref, name in ((B_ref, "B"), (C_ref, "C")):
        plgpu.copy_gmem_to_smem(
          ref.at[row, tokens, group], s[name].at[slot], loaded
        )
      plgpu.copy_gmem_to_smem(
        decays_ref.at[row, pl.ds(head, heads), chunk, pl.ds(0, 2)],
        s["decays"].at[slot],
        loaded,
      )
      for k in range(heads):
        plgpu.copy_gmem_to_smem(
          x_ref.at[row, tokens, head + k], s["x"].at[slot, k], loaded
        )

    def compute(own, state_s, y_s):
      if one_skip:
        D = given_refs["D"][own, 0]
      elif "D" in given:
        s["D"][worker] = plgpu.load(
          given_refs["D"].at[own], layout=COLUMN, optimized=False
        )
      if "initial" in given:
        state = plgpu.load(
          given_refs["initial"].at[row, segment, own],
          layout=TILE,
          optimized=False,
        )
      else:
        state = plgpu.layout_cast(jnp.zeros((p, n), jnp.float32), TILE)

      def step(i, state):
        slot = lax.rem(i, jnp.int32(stages))
        x_s, B_s, C_s = (
          s["x"].at[slot, worker],
          s["B"].at[slot],
          s["C"].at[slot],
        )
        state_s[...] = state.astype(x.dtype)
        plgpu.barrier_wait(s["loaded"].at[slot])
        plgpu.commit_smem()
        decays_s = s["decays"].at[slot, worker]
        cum_I = plgpu.load(decays_s.at[0], layout=ROW)
        cum_dt_J = plgpu.load(decays_s.at[1], layout=COLUMN)
        last = s["decays"][slot, worker, 0, CHUNK - 1]
        i_IJ, j_IJ = tiles.token_ids()

        def scores(add, read):
          add(0, C_s, B_s.T)
          add(1, C_s, state_s.T)
          exponent_IJ = tiles.rows(cum_I, CHUNK) - tiles.columns(
            cum_dt_J, CHUNK
          )
          pairs_IJ = tiles.masked_exp2(i_IJ >= j_IJ, exponent_IJ)
          weights_IJ = (read(0, 1) * pairs_IJ).astype(x.dtype)
          x_PJ = tiles.load_tile(x_s.T)
          x_PJ *= tiles.columns(jnp.exp2(last - cum_dt_J), p)
          y_IP = read(1, 0) * tiles.rows(jnp.exp2(cum_I), p)
          return weights_IJ, x_PJ.astype(x.dtype), y_IP

        weights_IJ, x_PJ, y_IP = tiles.products(
          ((CHUNK, CHUNK), (CHUNK, p)), scores, interpret
        )

        def sums(add, read):
          add(0, weights_IJ, x_s)
          add(1, x_PJ, B_s)
          y_IP = read(0, 1)
          if one_skip:
            y_IP += tiles.load_tile(x_s) * D
          elif "D" in given:
            D_P = plgpu.load(s["D"].at[worker], layout=COLUMN)
            y_IP += tiles.load_tile(x_s) * tiles.columns(D_P, CHUNK)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          y_s[...] = y_IP.astype(x.dtype)
          plgpu.commit_smem()
          tokens = pl.ds((first + i) * CHUNK, CHUNK)
          plgpu.copy_smem_to_gmem(y_s, y_ref.at[row, tokens, own])
          return read(1, 0)

        state = tiles.products((y_IP, state * jnp.exp2(last)), sums, interpret)
        plgpu.barrier_arrive(s["consumed"].at[slot])
        return state

      state = lax.fori_loop(0, steps, step, state)

      @pl.when(segment == segments - 1)
      def _():
        state_ref[row, own] = state

      plgpu.wait_smem_to_gmem(0)

    @pl.when(worker < heads)
    def _():
      tiles.set_registers(heads, computes=True)
      compute(head + worker, s["state"].at[worker], s["y"].at[worker])

    @pl.when(worker == heads)
    def _():
      tiles.set_registers(heads, computes=False)
      group = lax.div(head, jnp.int32(h // g))
      tiles.produce(
        lambda i, slot: fetch(first + i, slot, group),
        steps,
        stages,
        s["consumed"],
      )

  scratch = {
    "x": tiles.tile(stages, heads, CHUNK, p),
    "B": tiles.tile(stages, CHUNK, n),
    "C": tiles.tile(stages, CHUNK, n),
    "decays": tiles.vector(stages, heads, 2, CHUNK),
    "D": tiles.vector(heads, p),
    "state": tiles.tile(heads, p, n),
    "y": tiles.tile(heads, CHUNK, p),
    "loaded": plgpu.Barrier(num_arrivals=3 + heads, num_barriers=stages),
    "consumed": plgpu.Barrier(num_arrivals=heads, num_barriers=stages),
  }

  run = plgpu.kernel(
    kernel,
    out_type=(
      tiles.struct(x.shape, x.dtype),
      tiles.struct((b, h, p, n), jnp.float32),
    ),
    scratch_types=scratch,
    grid=(b, segments, h // heads),
    grid_names=("row", "segment", "heads"),
    num_threads=heads + 1,
    thread_name="worker",
    kernel_name="ssd_fwd",
    compiler_params=config.compiler_params(),
    interpret=interpret,
  )
  return run(x, decays, B, C, *given.values())
