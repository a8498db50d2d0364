"""A whole step of few rows in one kernel, for weights of few bits.

With few rows and few bits a layer is read in some microseconds, less than three
kernels take to begin and end. So one kernel, whose thread blocks all run at
once, goes through all layers, and its blocks wait for each other three times a
layer, by counters in memory:

- in: a block multiplies tiles of columns of in_proj, and steps the convolution;
- state: a warpgroup steps the states of half a head, and gates;
- out: a block multiplies tiles of out_proj, onto the residual stream.

Weights depend on nothing, so they come all the time, see `mosaic_gpu_ring`. The
kernel needs the whole GPU: where another program holds some multiprocessors, it
begins when they are free.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from ops import hopper_tiles
from ops.hopper import SHARED_MEMORY
from ops.hopper_tiles import TILE
from ops.mamba2_step import mosaic_gpu_ring as ring
from ops.mamba2_step.mosaic_gpu_ring import CHUNK
from ops.mamba2_step.mosaic_gpu_whole_step import PHASES, Config, Sizes, Step
from ops.quantized import QState, QTensor

NAME = "mamba2_step_whole"
# Bytes under way in each multiprocessor that keep memory busy.
ENOUGH = 64 * 1024
MAX_BATCH = ring.ROWS


def configure(
  batch: int,
  width: int,
  inner: int,
  bits: int,
  groups: int = 1,
  scaled: bool = True,
) -> Config | None:
  """Returns the Config for B, D, E, bits of a weight and G, or None; pure.

  One row of 4-bit weights is handled alone, and where each chunk is `scaled` a
  warpgroup's share of a unit comes as one copy: on an H200 a layer of Mamba-2
  2.7B took 16.4 us so, and 21.3 as eight rows in copies of a chunk. With
  several groups this ran on no GPU yet.
  """
  # Every block adds up the parts of the stream, which takes long for many rows.
  splits = (4, 2, 1) if batch == 1 else (2, 1) if batch == 2 else (1,)
  chosen, lean = None, batch == 1 and bits == 4 and groups == 1
  for split in splits:
    chunks = width // CHUNK, inner // CHUNK // split
    if inner % (split * CHUNK):
      continue
    common = math.gcd(*chunks)
    for warpgroups, teams in ((4, 2), (4, 1), (3, 1), (2, 1), (1, 1)):
      members = warpgroups // teams
      # Teams of a block have the same share of the rows.
      if common % members or (teams > 1 and width // TILE % teams):
        continue
      free = SHARED_MEMORY - 6144 - 2 * ring.ROWS * CHUNK * max(chunks)
      free -= 2 * 4 * warpgroups * (TILE if lean else ring.ROWS * (TILE + 4))
      free -= 6 * teams * ring.ROWS * TILE
      most = free // warpgroups // (TILE * CHUNK * bits // 8 + 4 * TILE)
      share = common // members
      for segment in range(1, share + 1):
        stages = min(most // segment, 32 // warpgroups)
        if share % segment or stages < 2:
          continue
        under_way = segment * stages * warpgroups * TILE * CHUNK * bits // 8
        worth = min(under_way, ENOUGH), split, warpgroups, teams, segment
        config = Config(
          warpgroups=warpgroups,
          teams=teams,
          segment=segment,
          stages=stages,
          splits=split,
        )
        if chosen is None or worth > chosen[0]:
          chosen = worth, config, share, min(most // share, 32 // warpgroups)
  if chosen is None:
    return None
  _, config, share, stages = chosen
  if lean and stages >= 2 and scaled:
    config = dataclasses.replace(
      config, segment=share, stages=stages, joined=True
    )
  return dataclasses.replace(config, lean=lean)


def unfit(x, weights, ssm_state) -> str | None:
  """Returns None if the kernel takes what `mosaic_gpu` does, else why not."""
  batch, width = x.shape
  if batch > MAX_BATCH:
    return f"needs at most {MAX_BATCH} rows, x is {x.shape}"
  pair = weights.in_proj, weights.out_proj
  if not all(isinstance(w, QTensor) for w in pair):
    return "needs weights in a number format"
  if pair[0].format.packed != pair[1].format.packed:
    return "needs weights of as many bits in both products"
  for w in pair:
    depth = w.shape[-2]
    if depth % CHUNK or depth // w.num_blocks % CHUNK:
      return f"needs groups of a multiple of {CHUNK}, weights are in {w.format}"
  inner, n = pair[1].shape[-2], ssm_state.shape[-1]
  heads = ssm_state.shape[-3]
  groups = (pair[0].shape[-1] - 2 * inner - heads) // (2 * n)
  if inner // groups % CHUNK:
    return f"needs groups of a norm of a multiple of {CHUNK} channels"
  if configure(batch, width, inner, pair[0].format.bits) is None:
    return "needs more shared memory than there is"
  return None


def forward(
  x, weights, conv_state, ssm_state, *, eps, config=None, interpret=False
) -> tuple[jax.Array, jax.Array, jax.Array | QState]:
  """Implements `mamba2_step`; arguments as there.

  `mosaic_gpu.unfit` and `unfit` must allow them. `config` is by default that of
  `configure`, `interpret` False or `InterpretGPUParams`.
  """
  batch, width = x.shape
  h, p, n = ssm_state.shape[2:]
  inner, channels = h * p, conv_state.shape[-1]
  sizes = Sizes(
    batch=batch,
    width=width,
    inner=inner,
    heads=h,
    groups=(channels - inner) // (2 * n),
    state=n,
    taps=conv_state.shape[2],
  )
  layers = conv_state.shape[0]
  if config is None:
    pair = weights.in_proj, weights.out_proj
    scaled = all(w.shape[-2] // w.num_blocks == CHUNK for w in pair)
    bits = pair[0].format.bits
    config = configure(batch, width, inner, bits, sizes.groups, scaled)
  if config.lean and batch > 1:
    raise ValueError("mamba2_step: a lean Config handles one row")
  weights = dataclasses.replace(
    weights,
    in_proj=ring.operands(weights.in_proj, bool(interpret)),
    out_proj=ring.operands(weights.out_proj, bool(interpret)),
    conv_weight=jnp.swapaxes(weights.conv_weight, 1, 2),
  )
  # The parts of the stream in front of even and of odd layers.
  parts = jnp.zeros((2, config.splits, ring.ROWS, width), jnp.float32)
  parts = parts.at[0, 0, :batch].set(x.astype(jnp.float32))
  run = functools.partial(
    _run, config=config, sizes=sizes, eps=eps, interpret=interpret
  )
  arrays = parts, conv_state, ssm_state
  if not interpret:
    span = np.asarray([0, layers], np.int32)
    arrays, _ = run(PHASES, span, weights, arrays, None)
  else:
    # The interpreter knows no counters in memory, so each phase is a kernel.
    handed = None
    for layer in range(layers):
      span = jnp.asarray([layer, layer + 1], jnp.int32)
      for phase in PHASES:
        arrays, handed = run((phase,), span, weights, arrays, handed)
  parts, conv_state, ssm_state = arrays
  return parts[layers % 2].sum(axis=0)[:batch], conv_state, ssm_state


@functools.partial(
  jax.jit,
  static_argnums=(0,),
  static_argnames=("config", "sizes", "eps", "interpret"),
)
def _run(
  phases, span, weights, arrays, handed, *, config, sizes, eps, interpret
):
  """Runs some phases of some layers.

  Args:
    phases: Of `PHASES`, in order; all of them, or in one layer one of them.
    span: (2,) int32, the first layer and the one behind the last.
    weights: Of all layers, as `forward` makes them.
    arrays: The parts of the stream, and both states.
    handed: What the phase before gave, or None where it runs here.
    config: A Config.
    sizes: Sizes.
    eps: Of both norms.
    interpret: False, or the parameters of the interpreter.

  Returns:
    The new arrays, and what this phase gave, if it is but one.
  """
  refs = jax.tree.map(jax.new_ref, arrays)
  made = [] if phases != PHASES else sizes.handed
  if handed is None and not made:
    handed = [jnp.zeros(one.shape, one.dtype) for one in sizes.handed]
  handed = [] if made else [jax.new_ref(one) for one in handed]
  state_refs = [refs[2]]
  if isinstance(refs[2], QState):
    state_refs = [refs[2].tensor.values, refs[2].tensor.scales]
  step = Step(
    config=config,
    sizes=sizes,
    phases=phases,
    eps=eps,
    packed=weights.in_proj[0].dtype in (jnp.uint8, jnp.int4),
    groups=tuple(
      1 if scales.ndim == 2 else scales.shape[1]
      for _, scales in (weights.in_proj, weights.out_proj)
    ),
    interpret=bool(interpret),
  )
  run = plgpu.kernel(
    step.kernel,
    out_type=made,
    grid=(config.blocks,),
    grid_names=("block",),
    num_threads=config.warpgroups,
    thread_name="warpgroup",
    scratch_types=step.scratch(),
    kernel_name=NAME,
    compiler_params=hopper_tiles.compiler_params(),
    interpret=interpret,
  )
  run(
    span, weights.norm, weights.conv_weight, weights.conv_bias, weights.dt_bias,
    weights.A_log, weights.D, weights.gated_norm, *weights.in_proj,
    *weights.out_proj, refs[0], refs[1], *state_refs, *handed,
  )  # fmt: skip
  return jax.tree.map(jax.freeze, refs), [jax.freeze(one) for one in handed]
