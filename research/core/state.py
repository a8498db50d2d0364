"""The training state that every method shares, and the jitted step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.core import mesh as mesh_lib

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that changes in training, and so all that a checkpoint holds.

  Attributes:
    step: int32 scalar, the number of updates done.
    params: pytree of trainable arrays.
    opt_state: the optax state of `params`.
    key: scalar typed key of the run. It stays as it is: a step derives its own
      by `step_key`, so that a resumed run draws the same numbers.
    extras: pytree of a method's own state (dual variables, averages); or None.
  """

  step: jax.Array
  params: Tree
  opt_state: Tree
  key: jax.Array
  extras: Tree = None


def create_state(
  params: Tree,
  tx: optax.GradientTransformation,
  key: jax.Array,
  extras: Tree = None,
) -> TrainState:
  """State before the first update, with a fresh optimizer state."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    key=key,
    extras=extras,
  )


def step_key(state: TrainState) -> jax.Array:
  """Scalar key of the current step: the run's key folded with the step."""
  return jax.random.fold_in(state.key, state.step)


def apply_gradients(
  state: TrainState, grads: Tree, tx: optax.GradientTransformation
) -> TrainState:
  """One optimizer update; `step` grows by one, `key` and `extras` stay."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  return dataclasses.replace(
    state,
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )


def jit_step(
  step_fn: Callable[[TrainState, Tree, Tree], tuple[TrainState, dict]],
  mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[TrainState, dict]]:
  """Compiles a training step over a mesh.

  The state is replicated and donated, the batch is split over "data" along its
  leading axis, `frozen` (say, the parameters of a language model that is not
  trained) is replicated and kept. Means over the batch become all-reduces by
  themselves, so one device and many give the same losses up to rounding.

  Args:
    step_fn: pure `(state, batch, frozen) -> (state, metrics)`.
    mesh: a mesh from `mesh.data_mesh`.

  Returns:
    `step(state, batch, frozen=None) -> (state, metrics)`. The state passed in
    is dead afterwards. Inputs may lie anywhere, but what is large and used
    again (`frozen`) should come through `mesh.replicate` once, or it is copied
    to the devices at every call. `step` raises InputError where the batch does
    not divide by the devices.
  """
  replicated = mesh_lib.replicated_sharding(mesh)
  jitted = jax.jit(
    step_fn,
    in_shardings=(replicated, mesh_lib.data_sharding(mesh), replicated),
    out_shardings=(replicated, replicated),
    donate_argnums=0,
  )

  def step(
    state: TrainState, batch: Tree, frozen: Tree = None
  ) -> tuple[TrainState, dict]:
    return jitted(
      mesh_lib.replicate(mesh, state),
      mesh_lib.shard_batch(mesh, batch),
      mesh_lib.replicate(mesh, frozen),
    )

  return step


@jax.jit
def all_finite(tree: Tree) -> jax.Array:
  """Whether no number of a tree is infinite or NaN: a boolean scalar."""
  leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)
