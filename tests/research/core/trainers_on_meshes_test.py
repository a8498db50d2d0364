"""Updates on one device and on meshes of eight.

Those of policies and of regression language models are beside their own tests
(`learn_test.py` of each), which have what one device does at hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.errors import InputError
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core.checkpoint import Checkpointer
from research.language_model import learn
from research.language_model.architectures import Model
from research.lra import data as lra_data
from research.lra import learn as lra_learn
from research.lra import training as lra_training
from research.lra.tasks import TASKS
from tests.research.lra import learn_test as lra

_CONFIGS = {
  "transformer": TransformerConfig.tiny(num_layers=2),
  "gemma": TransformerConfig.tiny_gemma(num_layers=2, sliding=(True, False)),
  "mamba2": MambaConfig.tiny("mamba2", num_layers=1, vocab_size=64),
}
_MESHES = {
  "rows": {"data": 8},
  "parameters": {"data": 2, "fsdp": 2, "tensor": 2},
  "heads": {"data": 4, "tensor": 2},
  "tokens": {"fsdp": 2, "sequence": 2, "tensor": 2},
}


def _batch():
  generator = np.random.default_rng(0)
  segments = np.tile((np.arange(16) >= 5).astype(np.int32), (8, 1))
  # So devices do not have the same number of tokens.
  segments[-1] = -1
  tokens = generator.integers(0, 64, (8, 17), dtype=np.int32)
  return {"tokens": tokens, "segment_ids": segments}


@functools.cache
def _lm(arch):
  model = Model(config=_CONFIGS[arch])
  schedule = optax.schedules.constant_schedule(0.3)
  tx = optax.sgd(schedule, momentum=0.9)
  step = learn.make_step(model, tx, schedule, vocab_size=64, z_loss=1e-2)
  params = jax.tree.map(np.asarray, model.init(jax.random.key(1)))
  return step, state_lib.create_state(params, tx, jax.random.key(0))


@functools.cache
def _compiled(arch, name):
  """The update of a language model on a mesh, and its state there."""
  mesh = mesh_lib.make(_MESHES.get(name, {"data": 1}))
  step, state = _lm(arch)
  state = mesh_lib.place(mesh, state)
  batch = mesh_lib.shard_batch(mesh, _batch())
  run = state_lib.compiled(step, mesh, state).lower(state, batch, None)
  return run.compile(), mesh


def _updates(arch, name, count=2):
  """Losses and gradient norms of some updates, and the state behind them."""
  run, mesh = _compiled(arch, name)
  state = mesh_lib.place(mesh, jax.tree.map(jnp.copy, _lm(arch)[1]))
  rows = []
  for _ in range(count):
    state, metrics = run(state, mesh_lib.shard_batch(mesh, _batch()), None)
    rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
  return rows, state


@functools.cache
def _alone(arch):
  return _updates(arch, "one")


@pytest.mark.parametrize(
  "arch, name",
  [
    ("transformer", "rows"),
    ("transformer", "parameters"),
    ("transformer", "tokens"),
    ("gemma", "tokens"),
    ("mamba2", "tokens"),
  ],
)
def test_language_models_are_one_device(arch, name):
  rows, state = _updates(arch, name)
  wanted, alone = _alone(arch)
  # Sums of some hundred float32 terms in another order.
  np.testing.assert_allclose(rows, wanted, rtol=2e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
    mesh_lib.to_host(state.params),
    mesh_lib.to_host(alone.params),
  )


def test_parameters_and_their_momentum_are_cut_alike():
  state = _updates("transformer", "parameters")[1]
  for tree in (state.params, state.opt_state[0].trace):
    kernel = tree["layers"]["attn"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 16)
    table = tree["embed"]["table"]
    assert table.sharding.shard_shape(table.shape) == (32, 16)
    assert tree["final_norm"]["scale"].is_fully_replicated


def _collectives(arch, name):
  return mesh_lib.collectives(_compiled(arch, name)[0].as_text())


def test_splitting_rows_costs_sums_of_gradients_alone():
  found = _collectives("transformer", "rows")
  assert found.pop("all-reduce") <= 2 and not any(found.values())


def test_tensor_parallelism_costs_two_sums_a_layer(optimized):
  """Those of the attention and the MLP, in each direction.

  In a scan they stand in the text once. Beside them are that of the token
  table, gradients over rows (in and behind the scan), the head's, and numbers;
  the head is gathered, and the gradient of its tokens.
  """
  found = _collectives("transformer", "heads")
  assert found.pop("all-gather") == 2
  assert found.pop("all-reduce") <= 10 and not any(found.values())


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, _updates("transformer", "parameters", 1)[1])
  run, mesh = _compiled("transformer", "tokens")
  like = mesh_lib.place(mesh, _lm("transformer")[1])
  _, state = checkpointer.restore_latest(like)
  kernel = state.params["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.sharding.mesh == mesh
  _, metrics = run(state, mesh_lib.shard_batch(mesh, _batch()), None)
  wanted = _alone("transformer")[0][1]
  found = [float(metrics["loss"]), float(metrics["grad_norm"])]
  np.testing.assert_allclose(found, wanted, rtol=2e-6)


def _one_and_many(step, state, batch, frozen, shape, **options):
  """Metrics of an update on one device and on a mesh."""
  found = []
  for size in ({"data": 1}, shape):
    mesh = mesh_lib.make(size)
    run = state_lib.jit_step(step, mesh, **options)
    own = mesh_lib.place(mesh, jax.tree.map(jnp.copy, state))
    found.append(mesh_lib.to_host(run(own, batch, frozen)[1]))
  return found


def _assert_close(one, many, rtol):
  assert one.keys() == many.keys()
  for name in one:
    np.testing.assert_allclose(
      many[name], one[name], rtol=rtol, atol=1e-6, err_msg=name
    )


def test_encoders_of_long_range_arena_are_one_device():
  loss = lra_learn.classify_loss(lra.CONFIG, lra.COMPUTE)
  step = lra_learn.make_round(loss, lra.OPTIONS, TASKS["listops"], None)
  batch = {
    "rows": lra_learn.rows_of(0, 3, 4, 10, lra.SEEDS),
    "rates": np.full((3, 2), 1e-3, np.float32),
    "numbers": np.arange(3),
  }
  one, many = _one_and_many(
    step,
    lra_learn.create_state(lra.members(), lra.OPTIONS, lra.SEEDS),
    batch,
    {"train": lra_learn.on_device(lra.split_of(10))},
    {"data": 2, "fsdp": 2},
    rows=False,
  )
  _assert_close(one, many, 5e-6)


def test_meshes_that_do_not_fit_are_told():
  with pytest.raises(InputError, match="asks for 64 devices, but 8"):
    mesh_lib.make({"data": 32, "tensor": 2})
  params = _lm("transformer")[1].params
  with pytest.raises(InputError, match="tensor:7 divides no array"):
    mesh_lib.check_used(mesh_lib.make({"tensor": 7}), params)
  mesh = mesh_lib.make({"fsdp": 2, "sequence": 4})
  with pytest.raises(InputError, match="--length=18 is no multiple"):
    mesh_lib.check_length(mesh, 18)
  with pytest.raises(InputError, match="--batch=6 is no multiple of 2 parts"):
    mesh_lib.check_batch(mesh, 6, accumulate=2)


def test_long_range_arena_cuts_no_tokens(tmp_path):
  run = lra_training.Run(
    options=lra.OPTIONS,
    data=lra_data.Options(length=16),
    workdir=tmp_path / "run",
    mesh=mesh_lib.make({"sequence": 2}),
  )
  with pytest.raises(InputError, match="sequence:2 cuts nothing of these"):
    lra_training.train(run, print)
  assert not (tmp_path / "run").exists()


def test_collectives_of_a_program_are_counted():
  text = "a = f32[] all-reduce(b)\n c = f32[] all-reduce-start(d)\n all-reduced"
  found = mesh_lib.collectives(text)
  assert found.pop("all-reduce") == 2 and not any(found.values())
