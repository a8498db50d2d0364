"""How fast language models decode and train, against what a device can.

The least work of a decoding step is to read the weights once, and to read and
write the state once; of an update, its matrix products
(`research.cost.language_model`). A model has random weights: speed does not
depend on them.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import mamba
from models.errors import InputError
from models.mamba_blocks import Implementations
from models.mamba_config import MambaConfig
from ops import dispatch
from research.bench import ceilings, profiling
from research.bench.peers import mamba_ssm_decode
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.cost import language_model as flops
from research.cost.roofline import Ceilings, Phase
from research.language_model import architectures, learn, training
from research.language_model.options import Options

DECODED = ("xla", "mosaic_gpu")
Row = dict[str, Any]

_PROMPT = 4
_VOCAB = 32768
_KERNELS = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to time.

  Attributes:
    decode: "MODEL:BATCH" each, MODEL a published size of `MambaConfig` such as
      mamba2_2_7b.
    train: "ARCH/PRESET:BxL" each, of `research.language_model.options`.
    steps: implementations of a decoding step, of `DECODED`.
    tokens: decoded in one call.
    repeats: calls that are timed.
    unroll: layers in one iteration of the scan in training; 0 for all.
    remat: compute layers again in the backward pass.
    peer: time mamba_ssm's decoding too.
    profile: name the kernels that an update's time goes to.
  """

  decode: Sequence[str] = ()
  train: Sequence[str] = ()
  steps: Sequence[str] = DECODED
  tokens: int = 64
  repeats: int = 5
  unroll: int = 1
  remat: bool = False
  peer: bool = False
  profile: bool = False

  def check(self) -> None:
    """Raises InputError where a name does not exist."""
    for spec in self.decode:
      _decoded(spec)
    for step in self.steps:
      if step not in DECODED:
        raise InputError(f"steps={step}: take from {', '.join(DECODED)}")
    for spec in self.train:
      _trained(spec)


def run(plan: Plan, say: Callable[[str], None]) -> Iterator[Row]:
  """Yields a row for every setting that runs here.

  Args:
    plan: what to time.
    say: prints a line.

  Raises:
    InputError: a name does not exist.
  """
  plan.check()
  limits, source = ceilings.find("bfloat16")
  for spec in plan.decode:
    for row in _decode_rows(plan, spec, limits, say):
      yield _told(row | {"peak": source}, say)
  for spec in plan.train:
    row = _train_row(plan, spec, limits)
    yield _told(row | {"peak": source}, say)


def _told(row: Row, say) -> Row:
  line = f"{row['op']} {row['model']} {row['shape']} {row['implementation']}: "
  line += f"{row['ms']:.3f} ms, {row['tokens_per_second']:,.0f} tokens/s, "
  line += f"floor {row['floor_ms']:.3f} ms ({row['share']:.1%})"
  if row["peer_ms"] is not None:
    line += f", {row['peer']} {row['peer_ms']:.3f} ms"
  say(line)
  return row


def _decoded(spec: str) -> tuple[MambaConfig, int]:
  name, _, batch = spec.partition(":")
  sizes = [
    key
    for key, value in vars(MambaConfig).items()
    if isinstance(value, classmethod) and key.startswith("mamba")
  ]
  tiny = {f"tiny_{kind}": kind for kind in ("mamba1", "mamba2")}
  if not batch.isdigit() or int(batch) < 1 or name not in (*sizes, *tiny):
    raise InputError(
      f"decode={spec}: write MODEL:BATCH, such as mamba2_130m:1, with MODEL "
      f"one of {', '.join((*sizes, *tiny))}"
    )
  if name in tiny:
    return MambaConfig.tiny(tiny[name]), int(batch)
  return getattr(MambaConfig, name)(), int(batch)


def _trained(spec: str) -> Options:
  model, _, shape = spec.partition(":")
  arch, _, preset = model.partition("/")
  batch, _, length = shape.partition("x")
  if not (batch.isdigit() and length.isdigit()):
    raise InputError(
      f"train={spec}: write ARCH/PRESET:BxL, such as mamba2/60m:64x1024"
    )
  return Options(
    arch=arch,
    preset=preset or None,
    batch=int(batch),
    length=int(length),
    vocab_size=_VOCAB,
    document_mask=False,
  )


def _initial(config: MambaConfig) -> Any:
  """Parameters as training begins with, in bfloat16.

  So every layer counts in the error: small random norms would silence them.
  """

  @jax.jit
  def draw():
    params = mamba.init(config, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

  return draw()


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("tokens", "step"),
  donate_argnums=3,
)
def _greedy(config, params, current, state, *, tokens, step):
  """Decodes `tokens` more of each row: the state, the last, and its logits."""
  implementations = Implementations(step=step)

  def one(carry, _):
    current, state, _ = carry
    logits, state = mamba.decode(
      config,
      params,
      current[:, None],
      state,
      implementations=implementations,
    )
    logits = logits[:, 0]
    return (jnp.argmax(logits, axis=-1), state, logits), None

  blank = jnp.zeros((current.shape[0], config.vocab_size), jnp.float32)
  carry, _ = jax.lax.scan(one, (current, state, blank), length=tokens)
  return carry


def _logits(config, params, batch, dtype, step):
  """Logits after a few tokens that do not depend on those before."""
  state = mamba.init_state(config, batch, dtype=dtype)
  decode = jax.jit(
    lambda params, tokens, state: mamba.decode(
      config,
      params,
      tokens,
      state,
      implementations=Implementations(step=step),
    ),
    donate_argnums=2,
    # Not timed: to look for fast products would take most of a minute.
    compiler_options={"xla_gpu_autotune_level": 0},
  )
  for token in range(_PROMPT):
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None] % config.vocab_size
    logits, state = decode(params, (tokens + token) % 50, state)
  return logits


def _decode_rows(plan: Plan, spec: str, limits: Ceilings, say):
  config, batch = _decoded(spec)
  params = _initial(config)
  state = mamba.init_state(config, batch, dtype=jnp.bfloat16)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  moved = size(params) + 2 * size(state)
  products = 2.0 * batch * sum(leaf.size for leaf in jax.tree.leaves(params))
  floor = 1e3 * limits.floor([Phase(products, moved)])
  with jax.default_matmul_precision("highest"):
    exact = _logits(
      config,
      jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
      batch,
      jnp.float32,
      "xla",
    )
  found = []
  for step in plan.steps:
    try:
      logits = _logits(config, params, batch, jnp.bfloat16, step)
    except dispatch.UnsupportedError as error:
      say(f"{spec} left out: {error}")
      continue
    error = jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact)
    current = jnp.zeros((batch,), jnp.int32)
    state = mamba.init_state(config, batch, dtype=jnp.bfloat16)
    times = []
    for _ in range(plan.repeats + 1):
      began = time.perf_counter()
      current, state, _ = jax.block_until_ready(
        _greedy(config, params, current, state, tokens=plan.tokens, step=step)
      )
      times.append((time.perf_counter() - began) / plan.tokens)
    ms = 1e3 * statistics.median(times[1:])
    found.append({"implementation": step, "ms": ms, "error": float(error)})
  del params, state
  peer = _peer(plan, config, batch, say)
  for row in found:
    yield {
      "op": "decode",
      "model": spec.partition(":")[0],
      "shape": f"B{batch}",
      "dtype": "bfloat16",
      "pass": "fwd",
      **row,
      **peer,
      "tokens_per_second": 1e3 * batch / row["ms"],
      "floor_ms": floor,
      "share": floor / row["ms"],
      "bytes_moved": moved,
    }


def _peer(plan: Plan, config: MambaConfig, batch: int, say) -> Row:
  """The columns of the peer."""
  nothing = {"peer": None, "peer_detail": None, "peer_ms": None}
  if not plan.peer:
    return nothing
  reason = mamba_ssm_decode.missing()
  if reason is not None:
    say(f"peer mamba_ssm is left out: {reason}")
    return nothing
  decode, wait = mamba_ssm_decode.make(config, batch, plan.tokens)
  times = []
  for _ in range(plan.repeats + 1):
    began = time.perf_counter()
    decode()
    wait()
    times.append((time.perf_counter() - began) / plan.tokens)
  ms = 1e3 * statistics.median(times[1:])
  return {"peer": "mamba_ssm", "peer_detail": "CUDA graph", "peer_ms": ms}


def _train_row(plan: Plan, spec: str, limits: Ceilings) -> Row:
  options = _trained(spec)
  config = architectures.config_of(options, _VOCAB)
  cudnn = options.arch == "transformer" and jax.default_backend() == "gpu"
  model = architectures.Model(
    config=config,
    dtype=options.dtype,
    implementations=Implementations(attention="cudnn" if cudnn else None),
    document_mask=False,
    unroll=plan.unroll,
    remat=plan.remat,
  )
  schedule, tx = training.make_optimizer(options)
  mesh = mesh_lib.data_mesh(1)
  step = learn.make_step(
    model, tx, schedule, mesh, vocab_size=_VOCAB, z_loss=options.z_loss
  )
  step = state_lib.jit_step(step, mesh)
  draw = np.random.default_rng(0).integers
  shape = options.batch, options.length
  batch = {
    "tokens": draw(_VOCAB, size=(shape[0], shape[1] + 1), dtype=np.int32),
    "segment_ids": np.zeros(shape, np.int32),
  }
  batch = mesh_lib.shard_batch(mesh, batch)
  params = jax.jit(model.init)(jax.random.key(0))
  state = state_lib.create_state(params, tx, jax.random.key(0))
  began = time.perf_counter()
  state, _ = jax.block_until_ready(step(state, batch, None))
  compiled = time.perf_counter() - began
  times = []
  for _ in range(plan.repeats):
    began = time.perf_counter()
    for _ in range(4):
      state, metrics = step(state, batch, None)
    jax.block_until_ready(metrics)
    times.append((time.perf_counter() - began) / 4)
  ms = 1e3 * statistics.median(times)
  work = options.tokens_per_step * flops.training(config, options.length)
  floor = 1e3 * work / limits.flops
  row = {
    "op": "update",
    "model": spec.partition(":")[0],
    "shape": f"B{options.batch} L{options.length}",
    "dtype": options.dtype,
    "pass": "fwd+bwd",
    "implementation": "default",
    "ms": ms,
    "error": None,
    **{"peer": None, "peer_detail": None, "peer_ms": None},
    "tokens_per_second": 1e3 * options.tokens_per_step / ms,
    "floor_ms": floor,
    "share": floor / ms,
    "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "compile_seconds": compiled,
  }
  if plan.profile:

    def update():
      nonlocal state
      state, metrics = step(state, batch, None)
      return metrics

    kernels = profiling.kernels(update)
    row["busy_ms"] = sum(kernel.ms for kernel in kernels)
    row["kernels"] = [dataclasses.asdict(k) for k in kernels[:_KERNELS]]
  return row
