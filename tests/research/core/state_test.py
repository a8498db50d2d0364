import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import mesh, metrics, state
from tests.research.core import toy

# Runs the toy on 1 and on 8 devices, and a batch that 8 cannot share.
_EIGHT = """
import json, sys
from models.errors import InputError
from research.core import mesh
from tests.research.core import toy
for devices in (1, 8):
  last = toy.train(f"{sys.argv[1]}/{devices}", devices)
  assert len(last.params["w"].sharding.device_set) == devices
try:
  mesh.shard_batch(mesh.data_mesh(8), {"x": toy.batch_at(0)["x"][:12]})
except InputError as error:
  print(json.dumps(str(error)))
"""


def test_apply_gradients_is_one_optax_update():
  tx = optax.sgd(0.5)
  old = state.create_state({"w": jnp.ones(3)}, tx, jax.random.key(1), "kept")
  new = state.apply_gradients(old, {"w": jnp.arange(3.0)}, tx)
  np.testing.assert_array_equal(new.params["w"], [1.0, 0.5, 0.0])
  assert new.step == 1 and new.step.dtype == jnp.int32
  assert new.extras == "kept" and (new.key == old.key).all()
  assert (state.step_key(new) != state.step_key(old)).all()


def test_the_step_compiles_once_and_takes_frozen_arrays():
  tx, first = toy.initial_state()
  traced = chex.assert_max_traces(lambda s, b, f: step_fn(s, b, f), n=1)

  def step_fn(old, batch, frozen):
    loss = frozen["scale"] * jnp.sum(batch["x"])
    return state.apply_gradients(old, old.params, tx), {"loss": loss}

  step = state.jit_step(traced, mesh.data_mesh(1))
  frozen = {"scale": jnp.float32(2)}
  now = first
  for number in range(3):
    batch = toy.batch_at(number)
    now, numbers = step(now, batch, frozen)
    np.testing.assert_allclose(numbers["loss"], 2 * batch["x"].sum(), rtol=1e-5)
  assert now.step == 3
  assert frozen["scale"] == 2


def test_a_donated_state_is_dead():
  tx, first = toy.initial_state()
  step = toy.make_step(tx, 1)
  second, _ = step(first, toy.batch_at(0))
  step(second, toy.batch_at(1))
  with pytest.raises(RuntimeError, match="deleted"):
    np.asarray(second.params["w"])


def test_one_and_eight_devices_give_the_same_losses(tmp_path):
  flags = os.environ.get("XLA_FLAGS", "")
  flags = " ".join(f for f in flags.split() if "device_count" not in f)
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8".strip(),
  }
  env.pop("JAX_NUM_CPU_DEVICES", None)
  done = subprocess.run(
    [sys.executable, "-c", _EIGHT, str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[3],
    env=env,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert "(12, 4) cannot be cut into 8 parts" in json.loads(done.stdout)
  one, eight = (
    [row["loss"] for row in metrics.read_jsonl(tmp_path / n / "metrics.jsonl")]
    for n in ("1", "8")
  )
  assert len(one) == 12 and one[0] > 2 * one[-1]
  # Losses are sums of 16 float32 squares, added in another order.
  np.testing.assert_allclose(one, eight, rtol=16 * np.finfo(np.float32).eps)
