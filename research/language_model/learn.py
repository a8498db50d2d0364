"""One update of a language model, and its evaluation.

The loss of a batch is a sum over its tokens over their number, whatever parts
or devices the batch is cut into: sums and numbers are added up, never means.
Axis letters: B windows, L tokens, A parts of a batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ops import sharding
from ops.token_logprob import token_logprob
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core.state import TrainState
from research.language_model.architectures import Model

Tree = Any
Batch = Mapping[str, jax.Array]


def token_sums(
  model: Model, params: Tree, batch: Batch, vocab_size: int
) -> dict[str, jax.Array]:
  """Sums over the tokens of a batch that are not padding.

  Args:
    model: what is trained.
    params: of it.
    batch: "tokens" (B, L + 1) and "segment_ids" (B, L), as
      `research.text.packing` makes them.
    vocab_size: tokens there are; the table may have more rows, which get no
      probability.

  Returns:
    Scalars "nll" (nats), "squared_normalizer" and "tokens" (their number).
  """
  by_rows = lambda x: sharding.constrain(x, "batch", "length")
  inputs, targets = map(
    by_rows, (batch["tokens"][:, :-1], batch["tokens"][:, 1:])
  )
  weights = by_rows((batch["segment_ids"] >= 0).astype(jnp.float32))
  logprob, log_normalizer = token_logprob(
    model.hidden(params, inputs, batch["segment_ids"]),
    model.head(params),
    targets,
    return_log_normalizer=True,
    valid_vocab=vocab_size,
  )
  return {
    "nll": -jnp.sum(weights * logprob),
    "squared_normalizer": jnp.sum(weights * jnp.square(log_normalizer)),
    "tokens": jnp.sum(weights),
  }


def make_step(
  model: Model,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  vocab_size: int,
  accumulate: int = 1,
  z_loss: float = 0.0,
) -> Callable[[TrainState, Batch, None], tuple[TrainState, dict]]:
  """The update, for `state.jit_step`.

  Args:
    model: what is trained.
    tx: the optimizer.
    schedule: its learning rate, for the metrics.
    vocab_size: tokens there are.
    accumulate: parts of the batch (of each device's share of it, which they
      divide), one after the other, so that only one part's activations are
      alive.
    z_loss: weight of the squared log normalizer (PaLM, section 5).

  Returns:
    `(state, batch, frozen) -> (state, metrics)`.
  """

  def objective(params, part):
    sums = token_sums(model, params, part, vocab_size)
    return sums["nll"] + z_loss * sums["squared_normalizer"], sums

  def gradients(params, batch):
    added = jax.grad(objective, has_aux=True)
    if accumulate == 1:
      return added(params, batch)
    parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
    like = jax.eval_shape(added, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def add(total, part):
      return jax.tree.map(jnp.add, total, added(params, part)), None

    return jax.lax.scan(add, zeros, parts)[0]

  def step(state: TrainState, batch: Batch, frozen: None):
    grads, sums = gradients(state.params, batch)
    tokens = jnp.maximum(sums["tokens"], 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    metrics = {
      "loss": sums["nll"] / tokens,
      "squared_normalizer": sums["squared_normalizer"] / tokens,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": schedule(state.step),
    }
    return state_lib.apply_gradients(state, grads, tx), metrics

  return step


def make_evaluation(
  model: Model, mesh: jax.sharding.Mesh, batches: list[Batch], vocab_size: int
) -> Callable[[Tree], float]:
  """A function from parameters to the mean loss (nats a token) of `batches`.

  The batches are placed on the devices once.
  """
  sums = jax.jit(
    mesh_lib.traced(
      mesh,
      lambda params, batch: token_sums(model, params, batch, vocab_size),
    ),
    out_shardings=mesh_lib.replicated_sharding(mesh),
  )
  placed = [mesh_lib.shard_batch(mesh, batch) for batch in batches]

  def evaluate(params: Tree) -> float:
    # Sums are taken on the host in float64, because many batches are added.
    found = jax.device_get([sums(params, batch) for batch in placed])
    tokens = sum(float(part["tokens"]) for part in found)
    return sum(float(part["nll"]) for part in found) / tokens

  return evaluate


def _parts(x: jax.Array, count: int) -> jax.Array:
  """Cuts the rows of (B, ...) into (A, B / A, ...), each device its own."""
  parts = x.reshape(x.shape[0] // count, count, *x.shape[1:])
  return jnp.moveaxis(parts, 1, 0)
