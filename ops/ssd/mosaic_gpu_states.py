"""The kernel of `ssd` that walks over chunks for their states alone.

Run forwards over x and B it gives the state before each chunk, run backwards
over dy and C the gradient of the state after each chunk; without the states of
the chunks, only that at the end of each segment of the rows.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops.ssd import mosaic_gpu_tiles as tiles
from ops.ssd.mosaic_gpu_tiles import CHUNK, COLUMN, TILE


def scan(u, v, decays, initial, *, reverse=False, last=True, config, interpret):
  """Returns the state before each chunk and that at the end of the rows.

  Forwards S <- exp(cum) S + sum_J exp(cum - cum_J) dt_J u_J v_J^T, backwards
  S <- exp(cum) S + sum_I exp(cum_I) u_I v_I^T.

  Args:
    u: x or dy, (B, L, H, P) bfloat16.
    v: B or C, (B, L, G, N).
    decays: (B, H, L / CHUNK, 3, CHUNK), see `mosaic_gpu_decays.chunk_decays`.
    initial: State to begin with, (B, H, P, N) float32, or None for zeros.
    reverse: Whether to go backwards.
    last: Whether the state at the end is wanted, else it may be None.
    config: A `mosaic_gpu.Config`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    ((B, L / CHUNK, H, P, N) bfloat16, (B, H, P, N) float32).
  """
  run = functools.partial(
    _walk, u, v, decays, reverse=reverse, config=config, interpret=interpret
  )
  if config.segments == 1:
    initial = None if initial is None else initial[:, None]
    states, *ends = run(initial, every_chunk=True, ends=last)
    return states, ends[0][:, 0] if last else None
  starts, state = segment_starts(
    u, v, decays, initial, reverse=reverse, config=config, interpret=interpret
  )
  (states,) = run(starts, every_chunk=True, ends=False)
  return states, state


def segment_starts(
  u, v, decays, initial, *, reverse=False, config, interpret
) -> tuple[jax.Array, jax.Array]:
  """Returns the state before each segment, (B, K, H, P, N), and the last.

  All segments are walked at once from zeros, and then joined.
  """
  (added,) = _walk(
    u, v, decays, None, reverse=reverse, every_chunk=False, ends=True,
    config=config, interpret=interpret,
  )  # fmt: skip
  count, chunks = config.segments, decays.shape[2]
  padding = [(0, 0), (0, 0), (0, -chunks % count)]
  totals = jnp.pad(decays[:, :, :, 0, -1], padding)
  totals = totals.reshape(*totals.shape[:2], count, -1).sum(3)
  kept = jnp.exp2(totals)[..., None, None]
  state = jnp.zeros_like(added[:, 0]) if initial is None else initial
  starts = [None] * count
  for k in reversed(range(count)) if reverse else range(count):
    starts[k] = state
    state = kept[:, :, k] * state + added[:, k]
  return jnp.stack(starts, axis=1), state


def _walk(
  u, v, decays, initial, *, reverse, every_chunk, ends, config, interpret
) -> tuple[jax.Array, ...]:
  """Returns the states of every_chunk, then those at the ends of segments."""
  b, length, h, p = u.shape
  g, n = v.shape[2:]
  heads, stages, segments = config.heads, config.stages, config.segments
  chunks = length // CHUNK
  share = -(-chunks // segments)

  def kernel(u_ref, v_ref, decays_ref, *rest, **s):
    initial_ref, rest = (
      (rest[0], rest[1:]) if initial is not None else (None, rest)
    )
    states_ref, last_ref = rest[0], rest[-1]
    worker = lax.axis_index("worker")
    row = lax.axis_index("row")
    segment = lax.axis_index("segment")
    head = lax.axis_index("heads") * heads
    first = segment * share
    steps = jnp.minimum(share, chunks - first)
    chunk_of = lambda i: first + (steps - 1 - i if reverse else i)

    def fetch(i, slot):
      tokens = pl.ds(chunk_of(i) * CHUNK, CHUNK)
      loaded = s["loaded"].at[slot]
      group = lax.div(head, jnp.int32(h // g))
      plgpu.copy_gmem_to_smem(
        v_ref.at[row, tokens, group], s["v"].at[slot], loaded
      )
      plgpu.copy_gmem_to_smem(
        decays_ref.at[row, pl.ds(head, heads), chunk_of(i), pl.ds(0, 2)],
        s["decays"].at[slot],
        loaded,
      )
      for k in range(heads):
        plgpu.copy_gmem_to_smem(
          u_ref.at[row, tokens, head + k], s["u"].at[slot, k], loaded
        )

    def compute(own):
      if initial is None:
        state = plgpu.layout_cast(jnp.zeros((p, n), jnp.float32), TILE)
      else:
        state = plgpu.load(
          initial_ref.at[row, segment, own], layout=TILE, optimized=False
        )

      def step(i, state):
        slot = lax.rem(i, jnp.int32(stages))
        if every_chunk:
          state_s = s["state"].at[worker, lax.rem(i, jnp.int32(2))]
          plgpu.wait_smem_to_gmem(1, wait_read_only=True)
          state_s[...] = state.astype(u.dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(state_s, states_ref.at[row, chunk_of(i), own])
        plgpu.barrier_wait(s["loaded"].at[slot])
        last = s["decays"][slot, worker, 0, CHUNK - 1]
        decays_s = s["decays"].at[slot, worker, 0 if reverse else 1]
        cum_J = plgpu.load(decays_s, layout=COLUMN)
        weights_J = jnp.exp2(cum_J if reverse else last - cum_J)
        u_PJ = tiles.load_tile(s["u"].at[slot, worker].T)
        u_PJ = (u_PJ * tiles.columns(weights_J, p)).astype(u.dtype)

        def sums(add, read):
          add(0, u_PJ, s["v"].at[slot])
          return read(0, 0)

        state = tiles.products((state * jnp.exp2(last),), sums, interpret)
        plgpu.barrier_arrive(s["consumed"].at[slot])
        return state

      state = lax.fori_loop(0, steps, step, state)
      if ends:
        last_ref[row, segment, own] = state
      plgpu.wait_smem_to_gmem(0)

    @pl.when(worker < heads)
    def _():
      tiles.set_registers(heads, computes=True)
      compute(head + worker)

    @pl.when(worker == heads)
    def _():
      tiles.set_registers(heads, computes=False)
      tiles.produce(fetch, steps, stages, s["consumed"])

  scratch = {
    "u": tiles.tile(stages, heads, CHUNK, p),
    "v": tiles.tile(stages, CHUNK, n),
    "decays": tiles.vector(stages, heads, 2, CHUNK),
    "loaded": plgpu.Barrier(num_arrivals=2 + heads, num_barriers=stages),
    "consumed": plgpu.Barrier(num_arrivals=heads, num_barriers=stages),
  }
  results = []
  if every_chunk:
    scratch["state"] = tiles.tile(heads, 2, p, n)
    results.append(tiles.struct((b, chunks, h, p, n), u.dtype))
  if ends:
    results.append(tiles.struct((b, segments, h, p, n), jnp.float32))
  run = plgpu.kernel(
    kernel,
    out_type=tuple(results),
    scratch_types=scratch,
    grid=(b, segments, h // heads),
    grid_names=("row", "segment", "heads"),
    num_threads=heads + 1,
    thread_name="worker",
    kernel_name="ssd_bwd_states" if reverse else "ssd_fwd_states",
    compiler_params=config.compiler_params(),
    interpret=interpret,
  )
  return run(u, v, decays, *([] if initial is None else [initial]))
