"""Losses, and rounds of many updates in one call of the device.

Several members, which differ in seed and learning rate alone, are trained at
once: parameters have them on axis 0. All data lies on the device. A round is a
scan over updates and then an evaluation on the validation data, so that small
models wait neither for the host nor for one another.

Shapes by axis letter: M members, K updates of a round, B sequences of an
update, N sequences of a split, L tokens, C classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import fabnet
from models.fabnet import Compute, Params
from models.fabnet_config import FABNetConfig
from models.implementations import Implementations
from ops import sharding
from research.core import optimizer
from research.core.state import TrainState
from research.lra.options import Options
from research.lra.reading import Split
from research.lra.tasks import Task

Tree = Any
# (params, tokens, lengths, labels, key) -> (loss, share of right answers).
Loss = Callable[..., tuple[jax.Array, jax.Array]]


def compute_of(options: Options) -> Compute:
  """How members are computed: kernels know no axis of members, XLA does."""
  return Compute(
    dtype=options.dtype,
    dropout=options.dropout,
    fourier="xla",
    butterfly="xla",
    mamba=Implementations(scan="xla", conv="xla", norm="xla"),
  )


def on_device(split: Split) -> dict[str, jax.Array]:
  """Arrays "tokens", "lengths" and "labels" of a split."""
  return {
    "tokens": jnp.asarray(split.tokens),
    "lengths": jnp.asarray(split.lengths),
    "labels": jnp.asarray(split.labels),
  }


def classify_loss(config: FABNetConfig, compute: Compute) -> Loss:
  """Mean cross entropy in nats, and the share of right answers."""

  def loss(params, tokens, lengths, labels, key):
    scores = fabnet.logits(
      config, params, tokens, lengths, compute=compute, key=key
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return nll.mean(), (scores.argmax(-1) == labels).mean()

  return loss


def restore_loss(
  config: FABNetConfig, compute: Compute, task: Task, rate: float
) -> Loss:
  """The same for hidden tokens: what stood there, by the token table.

  A share `rate` of the tokens is hidden at random (Amos et al. 2024,
  https://arxiv.org/abs/2310.02980). Labels are not looked at.
  """

  def loss(params, tokens, lengths, labels, key):
    del labels
    tokens = tokens.reshape(-1, tokens.shape[-1])
    lengths = lengths.reshape(-1)
    hide_key, drop_key = jax.random.split(key)
    there = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    hidden = jax.random.bernoulli(hide_key, rate, tokens.shape) & there
    shown = jnp.where(hidden, task.mask_token, tokens)
    x = fabnet.hidden(
      config, params, shown, lengths, compute=compute, key=drop_key
    )
    table = params["embed"]["table"].astype(jnp.float32)
    scores = jnp.einsum("bld,vd->blv", x, table)
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, tokens)
    count = jnp.maximum(hidden.sum(), 1)
    right = (scores.argmax(-1) == tokens) & hidden
    return jnp.where(hidden, nll, 0).sum() / count, right.sum() / count

  return loss


def augmented(task: Task, tokens: jax.Array, key: jax.Array) -> jax.Array:
  """Images (B, S * S) mirrored and shifted by up to 4 pixels at random.

  Those of dashes are turned by right angles instead of shifted.
  """
  side = task.side
  images = tokens.reshape(-1, side, side)
  keys = jax.random.split(key, len(images))

  def one(image, key):
    mirror_key, turn_key, shift_key = jax.random.split(key, 3)
    mirrored = jax.random.bernoulli(mirror_key)
    image = jnp.where(mirrored, image[:, ::-1], image)
    if task.name == "pathfinder32":
      turns = [functools.partial(jnp.rot90, k=k) for k in range(4)]
      return jax.lax.switch(
        jax.random.randint(turn_key, (), 0, 4), turns, image
      )
    start = jax.random.randint(shift_key, (2,), 0, 9)
    return jax.lax.dynamic_slice(jnp.pad(image, 4), start, image.shape)

  return jax.vmap(one)(images, keys).reshape(tokens.shape)


def transformation(options: Options) -> optax.GradientTransformation:
  """AdamW at rate 1: its update is proportional to the rate."""
  return optimizer.adamw(
    lambda step: 1.0,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=options.weight_decay,
    clip_norm=options.clip_norm,
  )


def init(config: FABNetConfig, seeds: np.ndarray) -> Params:
  """Random parameters of M members by seeds (M,)."""
  keys = jnp.stack([jax.random.key(int(seed)) for seed in seeds])
  make = jax.jit(jax.vmap(functools.partial(fabnet.init, config)))
  return make(keys)


def create_state(
  params: Params, options: Options, seeds: np.ndarray, *, pretraining=False
) -> TrainState:
  """State of M members before their first update.

  Keys of pretraining are its own, so that it and what follows it hide and drop
  different places.
  """
  keys = jnp.stack([jax.random.key(int(seed)) for seed in seeds])
  if pretraining:
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
  memory = jax.vmap(transformation(options).init)(params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=memory,
    key=keys,
    extras={
      "best": jax.tree.map(jnp.copy, params),
      "accuracy": jnp.full(len(seeds), -1.0),
    },
  )


def _make_update(loss: Loss, options: Options, task: Task):
  """One update of one member, by rows of the training data."""
  tx = transformation(options)
  augments = options.augment and task.side is not None

  def update(params, memory, key, rows, rate, train):
    tokens = train["tokens"][rows]
    if augments:
      key, own = jax.random.split(key)
      tokens = augmented(task, tokens, own)
    (nll, right), grads = jax.value_and_grad(loss, has_aux=True)(
      params,
      tokens.astype(jnp.int32),
      train["lengths"][rows],
      train["labels"][rows],
      key,
    )
    changes, new = tx.update(grads, memory, params)
    # An update that is no number is left out: others of the member may do, and
    # other members stand in the same arrays.
    good = jnp.isfinite(optax.tree.norm(grads))
    pick = functools.partial(jax.tree.map, lambda a, b: jnp.where(good, a, b))
    changed = jax.tree.map(lambda p, c: p + rate * c, params, changes)
    return pick((changed, new), (params, memory)), (nll, right)

  return update


def make_round(
  loss: Loss,
  options: Options,
  task: Task,
  evaluate: Callable[[Params, Mapping[str, jax.Array]], jax.Array] | None,
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, dict]]:
  """A round of updates, for `state.jit_step` with whole batches.

  Args:
    loss: of one member.
    options: of the run.
    task: that is learned.
    evaluate: `(params, split) -> (M,)` accuracies; None evaluates nothing.

  Returns:
    `(state, batch, data) -> (state, metrics)`. `batch` has "rows" (K, M, B)
    int32 of the training data, "rates" (K, M) and "numbers" (K,) of the
    updates; `data` has the splits "train" and "valid". After a round the
    parameters of the best validation so far are in `state.extras["best"]`.
  """
  update = _make_update(loss, options, task)

  def run(state: TrainState, batch, data):
    def step(carry, inputs):
      rows, rates, number = inputs
      rows = sharding.constrain(rows, "batch")
      keys = jax.vmap(jax.random.fold_in, (0, None))(state.key, number)
      return jax.vmap(update, (0, 0, 0, 0, 0, None))(
        *carry, keys, rows, rates, data["train"]
      )

    carry, (nll, right) = jax.lax.scan(
      step,
      (state.params, state.opt_state),
      (batch["rows"], batch["rates"], batch["numbers"]),
    )
    params, memory = carry
    metrics = {
      # One member that failed must not end those beside it.
      "loss": jnp.nanmean(nll[-10:]),
      "losses": nll[-10:].mean(0),
      "train_accuracy": right.mean(0),
      "updates": batch["numbers"][-1] + 1,
    }
    extras = state.extras
    if evaluate is not None:
      accuracy = evaluate(params, data["valid"])
      better = accuracy > extras["accuracy"]
      wide = lambda x: better.reshape(-1, *(1,) * (x.ndim - 1))
      extras = {
        "best": jax.tree.map(
          lambda new, old: jnp.where(wide(new), new, old),
          params,
          extras["best"],
        ),
        "accuracy": jnp.maximum(accuracy, extras["accuracy"]),
      }
      metrics |= {"valid_accuracy": accuracy, "accuracy": accuracy.mean()}
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      opt_state=memory,
      extras=extras,
    )
    return state, metrics

  return run


def make_evaluation(
  config: FABNetConfig, compute: Compute, batch: int
) -> Callable[[Params, Mapping[str, jax.Array]], jax.Array]:
  """`(params of M members, split) -> shares (M,) of right answers`."""
  compute = dataclasses.replace(compute, dropout=0.0)

  def evaluate(params, split):
    count = split["labels"].shape[0]
    size = min(batch, count)
    starts = jnp.arange(0, count, size)

    def some(right, start):
      # The last batch begins earlier, and what came before counts once.
      first = jnp.minimum(start, count - size)
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size)
      tokens, lengths, labels = (
        _by_rows(take(split[name])) for name in ("tokens", "lengths", "labels")
      )
      own = jax.vmap(
        lambda p: fabnet.logits(
          config, p, tokens.astype(jnp.int32), lengths, compute=compute
        )
      )(params)
      new = first + jnp.arange(size) >= start
      hits = (own.argmax(-1) == labels[None]) & new[None]
      return right + hits.sum(-1), None

    members = jax.tree.leaves(params)[0].shape[0]
    right, _ = jax.lax.scan(some, jnp.zeros(members, jnp.int32), starts)
    return right / count

  return evaluate


def _by_rows(x: jax.Array) -> jax.Array:
  return sharding.constrain(x, "batch", *(None,) * (x.ndim - 1))


def rows_of(
  step: int,
  rounds: int,
  batch: int,
  count: int,
  seeds: np.ndarray,
  *,
  pretraining: bool = False,
) -> np.ndarray:
  """Rows (K, M, B) of the updates `step` to `step + K`.

  Every member goes through the training data in shuffled epochs of its own; an
  update may hold the end of one and the beginning of the next. Pretraining has
  other orders than what follows it.
  """
  phase = 8 if pretraining else 7
  found = np.empty((rounds, len(seeds), batch), np.int32)
  first, last = step * batch, (step + rounds) * batch
  for member, seed in enumerate(seeds):
    parts = []
    for epoch in range(first // count, -(-last // count)):
      generator = np.random.default_rng((int(seed), epoch, phase))
      start = epoch * count
      order = generator.permutation(count)
      parts.append(order[max(first - start, 0) : last - start])
    found[:, member] = np.concatenate(parts).reshape(rounds, batch)
  return found
