"""What is timed on meshes: updates of trainers, and ops over long rows.

Weights are random, tokens are, too: speed depends on neither.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models import language_model, transformer
from models.attention import causal_attend
from models.implementations import Implementations
from ops.ssd import ssd
from research.bench import specs
from research.bench.mesh_cases import Case
from research.bench.suites import regression_lm as regression_suite
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.cost import language_model as cost
from research.language_model import architectures, learn, training
from research.language_model.architectures import Model
from research.language_model.options import Options
from research.sol import learn as sol_learn
from research.sol import policy as policy_lib
from research.sol import rollout as rollout_lib
from research.sol.options import Options as SolOptions
from research.sol.policy import InputStats

# Tokens of the vocabulary of models that have none of their own.
_VOCAB = 32_768
# An episode of SOL, and its group, as those of the suite `sol`.
_HORIZON, _GROUP = 16, 32
# Time steps of about softplus(-3) = 0.05, as Mamba begins with.
_DT_BIAS = -3.0

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What a case computes, before anything of it is on a device.

  Attributes:
    function: what is timed; `jax.jit` was applied.
    draw: from a key to arrays; `jax.jit` was applied.
    arguments: of `function`, of what `draw` gave.
    shapes: of the arguments, laid out.
    tokens: that a call goes through.
    flops: of a token, or None where they are not counted.
    keeps: whether a call's first result is the next call's first argument.
  """

  function: Callable
  draw: Callable[[jax.Array], Any]
  arguments: Callable[[Any], tuple]
  shapes: tuple
  tokens: int
  flops: float | None = None
  keeps: bool = True


def of(
  case: Case, mesh: jax.sharding.Mesh, dtype: str, attention: str | None
) -> Work:
  """The work of a case, of any kind that is timed.

  Args:
    case: what is timed.
    mesh: the devices.
    dtype: of activations, and of SOL's frozen model; trained parameters and
      moments of their optimizer are float32.
    attention: implementation, or None.

  Raises:
    InputError: the mesh does not do.
  """
  if case.kind in ("ssd", "attention"):
    mesh_lib.check_length(mesh, case.length)
    return _op(case, mesh, dtype, attention)
  mesh_lib.check_batch(mesh, case.batch)
  make = {"lm": _language_model, "sol": _sol, "rlm": _regression_lm}
  return make[case.kind](case, mesh, dtype, attention)


def config_of(case: Case) -> language_model.Config:
  """The language model of a case."""
  arch, slash, preset = case.name.partition("/")
  if not slash:
    return specs.models()[case.name]()
  options = Options(arch=arch, preset=preset, length=case.length)
  return architectures.config_of(options, _VOCAB)


def language_model_step(
  case: Case, mesh: jax.sharding.Mesh, dtype: str, attention: str | None
) -> tuple[Callable, Callable[[jax.Array], state_lib.TrainState]]:
  """The update of a language model, and what makes its state of a key.

  Models of a billion parameters and more compute activations again in the
  backward pass.
  """
  config = config_of(case)
  mesh_lib.check_length(mesh, case.length)
  params = language_model.abstract_params(config)
  mesh_lib.check_used(mesh, params)
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  model = Model(
    config=config,
    dtype=dtype,
    implementations=Implementations(attention=attention),
    document_mask=False,
    remat=size > 5e8,
  )
  schedule, tx = training.make_optimizer(Options(steps=1000))
  step = learn.make_step(model, tx, schedule, vocab_size=config.vocab_size)
  return step, lambda key: state_lib.create_state(model.init(key), tx, key)


def language_model_batch(case: Case, seed: int) -> dict[str, np.ndarray]:
  """Random rows of one text each."""
  draw = np.random.default_rng(seed).integers
  tokens = draw(config_of(case).vocab_size, size=(case.batch, case.length + 1))
  return {
    "tokens": tokens.astype(np.int32),
    "segment_ids": np.zeros((case.batch, case.length), np.int32),
  }


def _language_model(case, mesh, dtype, attention) -> Work:
  mesh_lib.check_length(mesh, case.length)
  step, create = language_model_step(case, mesh, dtype, attention)
  return _update(
    mesh,
    step,
    create,
    language_model_batch(case, 0),
    tokens=case.batch * case.length,
    flops=cost.training(config_of(case), case.length),
  )


def _regression_lm(case, mesh, dtype, attention) -> Work:
  del attention
  text = f"{case.name}:{case.batch}x{case.length}:{dtype}"
  step, create, batch = regression_suite.update(specs.regression("train", text))
  tokens = case.batch * case.length
  return _update(mesh, step, create, batch, tokens=tokens)


def _sol(case, mesh, dtype, attention) -> Work:
  """GRPO's update behind rollouts of all windows; prefixes are computed.

  Its attention is XLA's, as in the suite `sol`.
  """
  del attention
  small = case.name.startswith("tiny")
  options = SolOptions(
    preset="J-FL",
    context=case.length,
    horizon=8 if small else _HORIZON,
    windows=case.batch,
    group_size=2 if small else _GROUP,
  ).filled("frugal")
  config = config_of(case)
  method = options.method(config, None)
  tx = sol_learn.optimizer(1e-4, 2000, clip_norm=2.0, schedule="constant")
  # The share of work that an action leaves out stands for its damage.
  damage = 1.0 - rollout_lib.action_costs(method.setup.table)
  policy = functools.partial(policy_lib.init, method.policy)

  def frozen(key):
    lm = jax.tree.map(lambda x: x.astype(dtype), transformer.init(config, key))
    return sol_learn.Frozen(
      lm=lm,
      log_price=jnp.log(jnp.asarray([0.1, 10.0])),
      stats=InputStats.identity(method.policy.lm_width, damage),
      reference=policy(key),
    )

  draw = np.random.default_rng(0).integers
  tokens = draw(config.vocab_size, size=(case.batch, method.layout.length))
  batch = {
    "tokens": tokens.astype(np.int32),
    "ids": np.arange(case.batch, dtype=np.int32),
  }
  rollouts = method.layout.episodes * method.group_size
  return _update(
    mesh,
    sol_learn.make_step(method, tx),
    lambda key: state_lib.create_state(policy(key), tx, key),
    batch,
    frozen=frozen,
    tokens=case.batch * rollouts * method.setup.horizon,
  )


def _update(
  mesh, step, create, batch, *, tokens, frozen=lambda key: None, flops=None
) -> Work:
  """The work of a step; `create` and `frozen` make its arrays of a key."""
  draw = lambda key: (create(key), frozen(key))
  made = jax.eval_shape(draw, jax.random.key(0))
  rows = mesh_lib.batch_sharding(mesh)
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch
  )
  state, kept = (mesh_lib.abstract(mesh, tree) for tree in made)
  return Work(
    function=state_lib.compiled(step, mesh, state),
    shapes=(state, placed, kept),
    draw=jax.jit(draw, out_shardings=mesh_lib.shardings(mesh, made)),
    arguments=lambda made: (
      made[0],
      mesh_lib.shard_batch(mesh, batch),
      made[1],
    ),
    tokens=tokens,
    flops=flops,
  )


def _op(case, mesh, dtype, attention) -> Work:
  """Gradients by all sequences of an op, whose tokens are cut."""
  sizes = [int(size) for size in case.name.split("x")]
  front = case.batch, case.length
  if case.kind == "ssd":
    heads, width, state = sizes
    shapes = {"x": (*front, heads, width), "dt": (*front, heads),
              "B": (*front, 1, state), "C": (*front, 1, state)}  # fmt: skip
    decay = jnp.asarray(-np.linspace(1.0, 16.0, heads, dtype=np.float32))
    bias = jnp.asarray(np.full(heads, _DT_BIAS, np.float32))
    call = functools.partial(ssd, A=decay, dt_bias=bias, dt_softplus=True)
  else:
    shapes = dict.fromkeys("qkv", (*front, *sizes))
    attend = causal_attend(implementation=attention, keep=False)
    call = lambda q, k, v: attend(q, k, v, None)[0]

  def gradients(arrays):
    summed = lambda given: jnp.sum(call(**given).astype(jnp.float32))
    return jax.grad(summed)(arrays)

  names = {name for name, size in mesh.shape.items() if size > 1}
  axis = "sequence" if "sequence" in names else None
  where = NamedSharding(mesh, PartitionSpec(None, axis))
  shapes = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    for name, shape in shapes.items()
  }

  def draw(key):
    return {
      name: jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
      for i, (name, x) in enumerate(shapes.items())
    }

  return Work(
    function=jax.jit(mesh_lib.traced(mesh, gradients), out_shardings=where),
    shapes=(shapes,),
    draw=jax.jit(draw, out_shardings=where),
    arguments=lambda made: (made,),
    tokens=case.batch * case.length,
    keeps=False,
  )
