"""The loss of a batch and one update.

Losses are sums over examples and their number, added up over devices, so that
one device and many give the same. Shapes by axis letter: B texts, S examples
of a text, L text tokens, T target tokens, O objectives, G numbers of a grid.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models import regression_lm
from models.numbers import MISSING
from models.regression_lm import Params
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core.state import TrainState
from research.regression_lm import expected, likelihood
from research.regression_lm.expected import Grid
from research.regression_lm.likelihood import Model
from research.regression_lm.options import LossOptions

Tree = Any
Batch = Mapping[str, jax.Array]
# (trained, frozen) -> parameters of the model.
Combine = Callable[[Tree, Tree], Params]


def loss_sums(
  model: Model,
  params: Params,
  batch: Batch,
  options: LossOptions,
  grid: Grid | None = None,
  key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sums over the examples of a batch.

  Args:
    model: what is trained.
    params: of it.
    batch: "tokens" (B, L), "lengths" (B,), "targets" (B, T), all int32, and
      for a grid "scores" (B, O) float32, NaN where an objective is missing.
      Without a grid targets may be (B, S, T): S examples of each text, which
      is read once.
    options: what is minimised.
    grid: of the expected value.
    key: of dropout; None drops nothing.

  Returns:
    The summed objective, and the sums "nll" (nats, of all tokens of an
    example), "loss" (their mean over its tokens), "squared_error", "ranking",
    "examples" (their number, those with no objective left out).
  """
  keys = (None, None) if key is None else jax.random.split(key)
  memory = regression_lm.encode(
    model.config,
    params,
    batch["tokens"],
    batch["lengths"],
    compute=model.compute,
    dropout=options.dropout,
    key=keys[0],
  )
  targets = batch["targets"]
  if targets.ndim == 2:
    targets = targets[:, None]
  logprob, normalizer = likelihood.token_logprobs(
    model, params, memory, targets, dropout=options.dropout, key=keys[1]
  )
  count = jnp.sum(targets != MISSING, axis=-1)
  each = jnp.maximum(count, 1).astype(jnp.float32)
  sums = {
    "loss": -jnp.sum(logprob.sum(-1) / each),
    "nll": -jnp.sum(logprob),
    "squared_normalizer": jnp.sum(jnp.square(normalizer).sum(-1) / each),
    "examples": jnp.sum(count > 0).astype(jnp.float32),
  }
  objective = sums["loss"] + options.z_loss * sums["squared_normalizer"]
  if options.needs_grid:
    means = expected.scores(model, params, memory, batch["targets"], grid)
    sums["squared_error"] = expected.squared_error(means, batch["scores"])
    sums["ranking"] = expected.ranking_loss(means, batch["scores"])
    objective += options.expected_value * sums["squared_error"]
    objective += options.ranking * sums["ranking"]
  return objective, sums


def make_step(
  model: Model,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  options: LossOptions,
  *,
  combine: Combine = lambda trained, frozen: trained,
) -> Callable[[TrainState, Batch, Tree], tuple[TrainState, dict]]:
  """The update, for `state.jit_step`.

  Args:
    model: what is trained.
    tx: the optimizer.
    schedule: its learning rate, for the metrics.
    options: what is minimised.
    combine: makes the model's parameters of the trained ones and of
      `frozen["params"]`.

  Returns:
    `(state, batch, frozen) -> (state, metrics)`; `frozen["grid"]` is the grid
    of the loss, where it needs one. `frozen` may be None.
  """

  def objective(trained, part, frozen, key):
    frozen = frozen or {}
    params = combine(trained, frozen.get("params"))
    return loss_sums(model, params, part, options, frozen.get("grid"), key)

  summed = jax.grad(objective, has_aux=True)

  def step(state: TrainState, batch: Batch, frozen: Tree):
    key = state_lib.step_key(state) if options.dropout else None
    grads, sums = summed(state.params, batch, frozen, key)
    examples = jnp.maximum(sums.pop("examples"), 1.0)
    grads = jax.tree.map(lambda g: g / examples.astype(g.dtype), grads)
    metrics = jax.tree.map(lambda total: total / examples, sums)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = schedule(state.step)
    return state_lib.apply_gradients(state, grads, tx), metrics

  return step


def make_evaluation(
  model: Model,
  mesh: jax.sharding.Mesh,
  batches: list[Batch],
  *,
  options: LossOptions = LossOptions(),  # noqa: B008 (frozen)
  combine: Combine = lambda trained, frozen: trained,
) -> Callable[[Tree, Tree], dict[str, float]]:
  """A function from parameters to the mean losses of `batches`.

  The batches are placed on the devices once. Its results are "loss" (nats a
  token, mean over examples), "nll" (nats an example) and, where `options` ask
  for a grid, "squared_error" of expected scores.
  """

  def sums(trained, batch, frozen):
    frozen = frozen or {}
    params = combine(trained, frozen.get("params"))
    return loss_sums(model, params, batch, options, frozen.get("grid"))[1]

  summed = jax.jit(
    mesh_lib.traced(mesh, sums),
    out_shardings=mesh_lib.replicated_sharding(mesh),
  )
  placed = [mesh_lib.shard_batch(mesh, batch) for batch in batches]

  def evaluate(trained: Tree, frozen: Tree = None) -> dict[str, float]:
    found = jax.device_get([summed(trained, b, frozen) for b in placed])
    # Sums are taken on the host in float64, because many batches are added.
    total = lambda name: sum(float(part[name]) for part in found)
    examples = max(total("examples"), 1.0)
    names = [n for n in ("loss", "nll", "squared_error") if n in found[0]]
    return {name: total(name) / examples for name in names}

  return evaluate
