"""A least-squares run, small enough to be watched from all sides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core import loop, mesh, state
from research.core.options import RunOptions

CONFIG = {"learning_rate": 0.05, "seed": 3, "preset": ["a", "b"]}


def batch_at(step):
  """16 rows of a noisy linear map, another draw at every step."""
  generator = np.random.default_rng((3, step))
  x = generator.normal(size=(16, 4)).astype(np.float32)
  y = x @ np.arange(1, 5, dtype=np.float32)
  y += generator.normal(size=16).astype(np.float32) / 10
  return {"x": x, "y": y}


def initial_state(learning_rate=0.05):
  tx = optax.adam(learning_rate)
  params = {"w": jnp.zeros(4), "b": jnp.zeros(())}
  extras = {"average": jnp.zeros(())}
  return tx, state.create_state(params, tx, jax.random.key(3), extras)


def make_step(tx, devices):
  """Adam on the mean square error, with noise drawn from the step's key."""

  def step_fn(old, batch, frozen):
    noise = 0.01 * jax.random.normal(state.step_key(old), (4,))

    def loss_fn(params):
      error = batch["x"] @ (params["w"] + noise) + params["b"] - batch["y"]
      return jnp.mean(jnp.square(error))

    loss, grads = jax.value_and_grad(loss_fn)(old.params)
    if frozen is not None:
      loss = loss * frozen["scale"]
    new = state.apply_gradients(old, grads, tx)
    average = 0.9 * old.extras["average"] + 0.1 * loss
    new = dataclasses.replace(new, extras={"average": average})
    return new, {"loss": loss, "average": average, "noise": noise}

  return state.jit_step(step_fn, mesh.data_mesh(devices))


def train(workdir, devices=1, batches=batch_at, num_steps=12, **options):
  tx, first = initial_state()
  settings = {
    "flags": CONFIG,
    "checkpoint_every": 4,
    "log_every": 1,
    "progress": False,
  }
  for field in dataclasses.fields(RunOptions):
    if field.name in options:
      settings[field.name] = options.pop(field.name)
  return loop.run(
    make_step(tx, devices),
    first,
    batches,
    RunOptions(workdir=workdir, **settings),
    num_steps=num_steps,
    **options,
  )
