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


type Step = Callable[[TrainState, Tree, Tree], tuple[TrainState, dict]]


def compiled(step_fn: Step, mesh: jax.sharding.Mesh, state: TrainState) -> Any:
  """What `jax.jit` makes of a step whose arguments lie right.

  Args:
    step_fn: pure `(state, batch, frozen) -> (state, metrics)`.
    mesh: the devices.
    state: of the step, or its shapes.

  Returns:
    The function, which can be called or lowered. Its first argument is donated.
  """
  out = mesh_lib.shardings(mesh, state), mesh_lib.replicated_sharding(mesh)
  return jax.jit(
    mesh_lib.traced(mesh, step_fn), out_shardings=out, donate_argnums=0
  )


def jit_step(
  step_fn: Step, mesh: jax.sharding.Mesh, *, rows: bool = True
) -> Callable[..., tuple[TrainState, dict]]:
  """Compiles a training step over a mesh.

  The state is laid out by `mesh.shardings` and donated, the batch is split by
  its rows, `frozen` (say, the parameters of a language model that is not
  trained) is laid out as the state is and kept. Means over the batch become
  sums over devices by themselves, so one device and many give the same losses
  up to rounding.

  Args:
    step_fn: pure `(state, batch, frozen) -> (state, metrics)`.
    mesh: the devices.
    rows: the batch is split; else it is whole on every device, and the step
      says by `ops.sharding.constrain` what is.

  Returns:
    `step(state, batch, frozen=None) -> (state, metrics)`. The state passed in
    is dead afterwards. Inputs may lie anywhere, but what is large and used
    again (`frozen`) should come through `mesh.place` once, or it is copied to
    the devices at every call. `step` raises InputError where the batch does
    not divide by the devices.
  """
  run = None
  spread = mesh_lib.shard_batch if rows else mesh_lib.replicate

  def step(
    state: TrainState, batch: Tree, frozen: Tree = None
  ) -> tuple[TrainState, dict]:
    nonlocal run
    run = run or compiled(step_fn, mesh, state)
    return run(
      mesh_lib.place(mesh, state),
      spread(mesh, batch),
      mesh_lib.place(mesh, frozen),
    )

  return step


@jax.jit
def all_finite(tree: Tree) -> jax.Array:
  """Whether no number of a tree is infinite or NaN: a boolean scalar."""
  leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)
