"""Losses of a training run on one device, on many, and on others from half on.

All begin with the same weights and see the same rows. That on many devices
writes a checkpoint half way, from which it goes on, and another run on half of
the devices.
"""

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from research.bench import mesh_work
from research.bench.mesh_cases import Case
from research.core import mesh as mesh_lib
from research.core import mesh_shape
from research.core import state as state_lib
from research.core.checkpoint import Checkpointer


def compared(
  case: Case, *, dtype: str, attention: str | None, updates: int
) -> dict[str, Any]:
  """A row of results: how far losses are from those of one device.

  Args:
    case: a language model; the axis of its mesh that is the first to have an
      even size is halved for the mesh that the run moves to.
    dtype: of activations.
    attention: implementation, or None.
    updates: of each run; half of them are in front of the checkpoint.

  Raises:
    InputError: the mesh does not do.
  """
  began = time.perf_counter()
  smaller = _halved(case.shape)
  step_on = functools.cache(
    lambda *shape: _step_on(dict(shape), case, dtype, attention)
  )
  run = lambda shape, *rest, **options: _losses(
    case, *step_on(*shape.items()), *rest, **options
  )
  half = updates // 2
  with (
    jax.default_matmul_precision("highest"),
    tempfile.TemporaryDirectory() as folder,
  ):
    kept = Checkpointer(pathlib.Path(folder))
    alone = run({"data": 1}, range(updates))
    first = run(case.shape, range(half), save_to=kept)
    moved = run(smaller, range(half, updates), kept)
    many = run(case.shape, range(half, updates), kept)
  many, moved = (np.concatenate([first, rest]) for rest in (many, moved))
  apart = lambda found: float(np.abs(found / alone - 1).max())
  return {
    "system": "scale",
    "group": case.group,
    "kind": case.kind,
    "model": case.name,
    "case": case.text,
    "batch": case.batch,
    "length": case.length,
    "mesh": mesh_shape.words(case.shape),
    "devices": mesh_lib.make(case.shape).size,
    "visible_devices": jax.device_count(),
    "moved_to": mesh_shape.words(smaller),
    "dtype": dtype,
    "updates": updates,
    "first_loss": float(alone[0]),
    "last_loss": float(alone[-1]),
    "most_relative": apart(many),
    "most_relative_moved": apart(moved),
    "row_seconds": time.perf_counter() - began,
  }


def _halved(shape: dict[str, int]) -> dict[str, int]:
  even = next((name for name, size in shape.items() if size % 2 == 0), None)
  return shape | ({even: shape[even] // 2} if even else {})


def _step_on(shape, case, dtype, attention):
  """A mesh, the update on it, and what makes its state of a key."""
  mesh = mesh_lib.make(shape)
  step, create = mesh_work.language_model_step(case, mesh, dtype, attention)
  return mesh, state_lib.jit_step(step, mesh), create


def _losses(
  case: Case,
  mesh: jax.sharding.Mesh,
  run: Callable,
  create: Callable,
  numbers: range,
  start: Checkpointer | None = None,
  *,
  save_to: Checkpointer | None = None,
) -> np.ndarray:
  """Losses of the updates of these numbers, from a checkpoint or afresh."""
  key = jax.random.key(0)
  if start:
    like = mesh_lib.abstract(mesh, jax.eval_shape(create, key))
    _, state = start.restore_latest(like)
  else:
    state = mesh_lib.build(mesh, create, key)
  losses = []
  for number in numbers:
    state, metrics = run(state, mesh_work.language_model_batch(case, number))
    losses.append(metrics["loss"])
  if save_to:
    save_to.save(len(losses), state)
  return np.asarray(jax.device_get(losses))
