"""Compiles whole training steps at their real size for TPUs, without a TPU.

  python -m tests.tpu_steps

The compiler is that of `tests/tpu_compile.py`. For each step it prints what one
chip would hold and send; it exits with 1 where a step does not fit, and with 2
where there is no compiler.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import language_model, regression_lm
from models.mamba_config import MambaConfig
from models.numbers import P10, TargetCodec
from models.regression_lm import Compute
from models.regression_lm_config import RegressionLMConfig
from models.transformer_config import TransformerConfig
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.language_model import learn as lm_learn
from research.language_model import options as lm_options
from research.language_model import training as lm_training
from research.language_model.architectures import Model
from research.regression_lm import learn as rlm_learn
from research.regression_lm import likelihood
from research.regression_lm import options as rlm_options
from research.regression_lm import training as rlm_training
from research.sol import learn as sol_learn
from research.sol import options as sol_options
from research.sol import policy as policy_lib
from research.sol.policy import InputStats
from tests import tpu_compile

# Bytes of memory of a chip.
_MEMORY = {"v5e": 16 << 30, "v6e": 32 << 30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """A step to compile.

  Attributes:
    name: of what is trained, and how much at a time.
    target: of the chips, as "v5e:4x4".
    shape: of the mesh.
    make: gives the function of a step, its state, batch and frozen arrays, all
      by their shapes.
  """

  name: str
  target: str
  shape: dict[str, int]
  make: Callable[[], tuple[Callable, Any, Any, Any]]


def _shape(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _mamba2():
  config, batch, length = MambaConfig.mamba2_2_7b(), 64, 2048
  model = Model(config=config, dtype="bfloat16", remat=True)
  schedule, tx = lm_training.make_optimizer(lm_options.Options(steps=1000))
  step = lm_learn.make_step(model, tx, schedule, vocab_size=config.vocab_size)
  params = language_model.abstract_params(config)
  state = jax.eval_shape(
    lambda p: state_lib.create_state(p, tx, jax.random.key(0)), params
  )
  tokens = _shape(batch, length + 1)
  rows = {"tokens": tokens, "segment_ids": _shape(batch, length)}
  return step, state, rows, None


def _sol():
  config = TransformerConfig.llama3_1_8b()
  given = sol_options.Options(preset="8B", windows=4).filled("published")
  method = given.method(config, None)
  tx = sol_learn.optimizer(1e-4, 1000, clip_norm=1.0, schedule="constant")
  params = jax.eval_shape(
    lambda: policy_lib.init(method.policy, jax.random.key(0))
  )
  state = jax.eval_shape(
    lambda p: state_lib.create_state(p, tx, jax.random.key(0)), params
  )
  lm = jax.tree.map(
    lambda x: _shape(*x.shape, dtype="bfloat16"),
    language_model.abstract_params(config),
  )
  actions = len(method.policy.costs)
  damage = np.zeros((actions, 3), np.float32)
  stats = jax.eval_shape(
    lambda: InputStats.identity(config.d_model, jnp.asarray(damage))
  )
  frozen = sol_learn.Frozen(
    lm=lm, log_price=_shape(2, dtype="float32"), stats=stats
  )
  windows = given.windows
  batch = {
    "tokens": _shape(windows, method.layout.length),
    "ids": _shape(windows),
  }
  return sol_learn.make_step(method, tx), state, batch, frozen


def _regression_lm():
  options = rlm_options.Options(batch=128, steps=1000)
  codec = TargetCodec(format=P10(), num_objectives=1)
  config = RegressionLMConfig.named(
    "large", vocab_size=32_000, target_vocab_size=len(codec.tokens),
    target_length=codec.length,
  )  # fmt: skip
  model = likelihood.Model(
    config=config, codec=codec, compute=Compute(dtype="bfloat16", remat=True)
  )
  schedule, tx = rlm_training.make_optimizer(options)
  step = rlm_learn.make_step(model, tx, schedule, options.loss())
  params = regression_lm.abstract_params(config)
  state = jax.eval_shape(
    lambda p: state_lib.create_state(p, tx, jax.random.key(0)), params
  )
  batch = {
    "tokens": _shape(options.batch, 2048),
    "lengths": _shape(options.batch),
    "targets": _shape(options.batch, codec.length),
  }
  return step, state, batch, None


STEPS = (
  Step(
    name="SOL on Llama-3.1-8B",
    target="v5e:4x4",
    shape={"data": 4, "tensor": 4},
    make=_sol,
  ),
  Step(
    name="Mamba-2 2.7B, 64 x 2048 tokens",
    target="v5e:4x8",
    shape={"fsdp": 32},
    make=_mamba2,
  ),
  Step(
    name="regression LM 300M, 128 x 2048 tokens",
    target="v6e:2x2",
    shape={"data": 4},
    make=_regression_lm,
  ),
)


def compiled(step: Step) -> jax.stages.Compiled:
  """The step as a TPU would run it."""
  mesh = mesh_lib.make(step.shape, tpu_compile.devices(step.target))
  function, state, batch, frozen = step.make()
  rows = mesh_lib.batch_sharding(mesh)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch
  )
  run = state_lib.compiled(function, mesh, state)
  lowered = run.lower(
    mesh_lib.abstract(mesh, state), batch, mesh_lib.abstract(mesh, frozen)
  )
  return lowered.compile()


def report(step: Step, found: jax.stages.Compiled, seconds: float) -> bool:
  """Prints what a chip holds and sends; whether it fits."""
  memory = found.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes
  held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
  counts = mesh_lib.collectives(found.as_text())
  collectives = ", ".join(f"{n} {k}" for k, n in counts.items() if n)
  room = _MEMORY[step.target.partition(":")[0]]
  flops = found.cost_analysis().get("flops", 0.0)
  print(
    f"{step.name} on {step.target} as {step.shape}: {held / 2**30:.2f} of "
    f"{room / 2**30:.0f} GiB a chip ({memory.temp_size_in_bytes / 2**30:.2f} "
    f"temporary), {flops / 1e12:.2f} TFLOP in its text (loops counted once), "
    f"{collectives or 'no collectives'}; compiled in {seconds:.0f} s",
    flush=True,
  )
  return held <= room


def main(names: list[str]) -> int:
  """Compiles all steps, or those whose names hold one of `names`."""
  if tpu_compile.library() is None:
    print("error: libtpu is missing: `make tpu-check` fetches it")
    return 2
  worst = 0
  for step in STEPS:
    if names and not any(name in step.name for name in names):
      continue
    began = time.perf_counter()
    try:
      fits = report(step, compiled(step), time.perf_counter() - began)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      line = str(error).splitlines()[0][:300]
      print(f"{step.name} on {step.target}: does not fit: {line}", flush=True)
      fits = False
    worst = worst if fits else 1
  return worst


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
