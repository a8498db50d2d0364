"""A whole step of one row in one kernel, for weights in bfloat16.

A kernel takes some microseconds to begin and end, and a layer of five as long
as a small layer's bytes. So one kernel, whose thread blocks all run at once,
goes through all layers, and its blocks wait for each other five times a layer,
by counters in memory:

- qkv: products, in parts where units share rows; the norm's factor follows;
- attend: rotates, writes the new token to the caches, attends to some slots;
- o: merges what was found, multiplies it, onto the residual stream;
- gate_up: both products, and the gate;
- down: onto the residual stream.

What a phase adds up in parts is added by those that read it. What comes from
memory depends on nothing, so it comes all the time: `mosaic_gpu_whole_ring`.
The kernel needs the whole GPU: where another program holds some
multiprocessors, it begins when they are free.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from ops import dispatch, hopper_tiles
from ops.hopper import PROCESSORS, SHARED_MEMORY
from ops.hopper_attention import QUERIES
from ops.hopper_tiles import TILE
from ops.quantized import is_quantized
from ops.transformer_step import mosaic_gpu
from ops.transformer_step.mosaic_gpu_whole_step import (
  BLOCK,
  PHASES,
  Config,
  Sizes,
  Step,
)

NAME = "transformer_step_whole"
# Bytes of a tile of weights.
_TILE_BYTES = 2 * TILE * TILE


def configure(sizes: Sizes, warpgroups: int | None = None) -> Config:
  """Returns the Config for Sizes; pure.

  More than three warpgroups would each have too few registers. On an H200 three
  took as long as two with a width of 576 (.488 and .496 ms a step of 30
  layers), and longer with one of 2,048 (.821 and .719 ms of 16 layers).
  """
  if warpgroups is None:
    warpgroups = 3 if sizes.width < 1024 else 2
  chosen = {}
  inner = sizes.heads * sizes.size
  wide = inner + 2 * sizes.kv_heads * sizes.size
  for name, depth, width in (
    ("qkv", sizes.width, wide), ("o", inner, sizes.width),
    ("down", sizes.hidden, sizes.width),
  ):  # fmt: skip
    per, splits = _cut(depth // TILE, width // TILE)
    chosen |= {f"{name}_per": per, f"{name}_splits": splits}
  tiles = sizes.hidden // TILE
  pers = range(-(-tiles // PROCESSORS), tiles + 1)
  chosen["gate_up_per"] = next(n for n in pers if tiles % n == 0)
  chosen["attend_splits"] = max(
    1, min(PROCESSORS // sizes.kv_heads, -(-sizes.slots // TILE // warpgroups))
  )
  chunks = max(
    sizes.width // TILE,
    inner // TILE // chosen["o_splits"],
    sizes.hidden // TILE // chosen["down_splits"],
  )
  # A vector of a product, or in its place what attention needs.
  attend = QUERIES * ((TILE + 4) * 4 + 2 * TILE) * (1 + sizes.parts)
  attend += 4 * sizes.size + 4 * 2 * QUERIES
  memory = max(2 * QUERIES * TILE * (chunks + BLOCK), warpgroups * attend)
  free = SHARED_MEMORY - 6144 - memory - 4 * 4 * TILE * warpgroups
  stages = free // (warpgroups * _TILE_BYTES)
  return Config(warpgroups=warpgroups, stages=stages, **chosen)


def _cut(chunks: int, tiles: int) -> tuple[int, int]:
  """Tiles of a unit, and units that share their rows.

  The fewer such units, the less there is to add up, but the more rows each has
  in shared memory. Each tile of a unit but the first has to be finished before
  the next one.
  """
  found = []
  for splits in range(1, min(chunks, 16) + 1):
    for per in range(1, tiles + 1):
      if chunks % splits or tiles % per or tiles // per * splits > PROCESSORS:
        continue
      depth = chunks // splits
      cost = per * depth + splits / 2 + depth / 8 + 4 * (per - 1)
      found.append((cost, splits, per))
  _, splits, per = min(found)
  return per, splits


def sizes_of(x, weights, keys) -> Sizes:
  """The Sizes of a step's arguments."""
  slots, kv_heads, size = keys.shape[2:]
  return Sizes(
    width=x.shape[-1],
    hidden=weights.gate_proj.shape[-1],
    heads=weights.q_proj.shape[-1] // size,
    kv_heads=kv_heads,
    size=size,
    slots=slots,
  )


def supports(
  x=None, weights=None, keys=None, values=None, lengths=None, frequencies=None,
  *, pages=None,
) -> str | None:  # fmt: skip
  """Returns None where `forward` runs on these arguments, else why not."""
  del lengths, frequencies
  if reason := dispatch.needs_wgmma():
    return reason
  device = dispatch.device()
  # Its blocks wait for each other, so all of them have to run at once.
  cores = getattr(device, "core_count", getattr(device, "num_cores", None)) or 0
  if cores < PROCESSORS:
    return f"needs {PROCESSORS} multiprocessors, this GPU has {cores}"
  if x is None:
    return None
  if pages is not None:
    return "reads whole caches, and no pages"
  return mosaic_gpu.unfit(x, weights, keys, values) or unfit(x, weights, keys)


def unfit(x, weights, keys) -> str | None:
  """Returns None if the kernel takes what `mosaic_gpu` does, else why not."""
  if x.shape[0] != 1:
    return f"needs one row, x is {x.shape}"
  if any(
    is_quantized(value)
    for name, value in vars(weights).items()
    if name.endswith("_proj")
  ):
    return "needs weights in bfloat16"
  if configure(sizes_of(x, weights, keys)).stages < 2:
    return "needs more shared memory than there is"
  return None


def forward(
  x, weights, keys, values, lengths, frequencies, *, eps, config=None,
  interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """Implements `transformer_step`; arguments as there.

  `mosaic_gpu.unfit` and `unfit` must allow them. `config` is by default that of
  `configure`, `interpret` False or `InterpretGPUParams`.
  """
  reason = mosaic_gpu.unfit(x, weights, keys, values)
  if reason := reason or unfit(x, weights, keys):
    raise ValueError(f"transformer_step: the whole kernel {reason}")
  sizes, layers = sizes_of(x, weights, keys), keys.shape[0]
  config = config or configure(sizes)
  angles = jnp.asarray(frequencies, jnp.float32) * lengths[0]
  turns = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
  tiles = sizes.width // TILE
  first = x.astype(jnp.float32).reshape(1, tiles, TILE)
  # As few kernels as can be go before the one that counts.
  pads = (0, config.down_splits - 1), (0, BLOCK), (0, 0)
  stream = jnp.pad(first, pads)
  norms = jnp.stack([weights.attn_norm, weights.mlp_norm])
  norms = norms.reshape(2, layers, tiles, TILE)
  norms = jnp.pad(norms, ((0, 0), (0, 0), (0, BLOCK), (0, 0)))
  operands = (
    lengths, turns, norms, weights.q_proj, weights.k_proj, weights.v_proj,
    weights.o_proj, weights.gate_proj, weights.up_proj, weights.down_proj,
  )  # fmt: skip
  run = functools.partial(
    _run, config=config, sizes=sizes, eps=eps, interpret=interpret
  )
  arrays = keys, values, stream
  if not interpret:
    span = np.asarray([0, layers], np.int32)
    arrays, _ = run(PHASES, span, operands, arrays, None)
  else:
    # The interpreter knows no counters in memory, so each phase is a kernel.
    handed = [jnp.zeros(one.shape, one.dtype) for one in sizes.handed(config)]
    for layer in range(layers):
      span = jnp.asarray([layer, layer + 1], jnp.int32)
      for phase in PHASES:
        arrays, handed = run((phase,), span, operands, arrays, handed)
  keys, values, stream = arrays
  found = stream[:, :tiles].sum(axis=0).reshape(x.shape)
  return found.astype(x.dtype), keys, values


@functools.partial(
  jax.jit,
  static_argnums=(0,),
  static_argnames=("config", "sizes", "eps", "interpret"),
)
def _run(
  phases, span, operands, arrays, handed, *, config, sizes, eps, interpret
):
  """Runs some phases of some layers.

  Args:
    phases: Of `PHASES`, in order; all of them, or in one layer one of them.
    span: (2,) int32, the first layer and the one behind the last.
    operands: What is only read, as `Refs` has it.
    arrays: Keys, values, and the stream in parts.
    handed: What phases hand to each other, or None where all run here.
    config: A Config.
    sizes: Sizes.
    eps: Of both norms.
    interpret: False, or the parameters of the interpreter.

  Returns:
    The new arrays, and what phases handed to each other.
  """
  refs = [jax.new_ref(one) for one in arrays]
  made = sizes.handed(config) if handed is None else []
  handed = [jax.new_ref(one) for one in handed or []]
  step = Step(
    config=config,
    sizes=sizes,
    phases=phases,
    eps=eps,
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
  run(span, *operands, *refs, *handed)
  return [jax.freeze(one) for one in refs], [jax.freeze(one) for one in handed]
