"""Adaptation to few examples, with early stopping on validation.

All in memory: examples are few and epochs short. Long training with files and
exact resume is `training`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from models.regression_lm import Params
from research.core import mesh as mesh_lib
from research.core import optimizer
from research.core import state as state_lib
from research.regression_lm import arguments, freezing, learn, lora
from research.regression_lm.expected import Scale
from research.regression_lm.likelihood import Model
from research.regression_lm.options import SCALES, LossOptions
from research.regression_lm.token_batches import Dataset

METHODS = ("full", "lora")
SELECT = ("loss", "expected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
  """How a model is adapted.

  Attributes:
    method: "full", or "lora" with adapters of `rank`.
    freeze_encoder: leave the encoder as it is, and adapt the decoder alone.
    prompt_shots: train with up to so many other examples of the same task in
      front of each, for `research.regression_lm.prompts`.
    max_epochs: at most.
    patience: epochs without a better validation loss before the end.
    batch: examples of an update, over all devices; fewer where there are fewer.
    learning_rate: peak; it falls to a tenth by a cosine over `max_epochs`.
    warmup: updates of linear warmup.
    weight_decay: of matrices.
    clip_norm: of the gradient; 0 leaves it.
    loss: what is minimised.
    select: what validation looks at: "loss", the cross-entropy, or "expected",
      the squared error of expected values, which goes on falling where few
      examples are learned by heart; it needs a loss over a grid.
    scale: of the losses over a grid, "value" or "rank".
    grid: numbers of that grid.
    rank: of the adapters.
    alpha: adapters are scaled by alpha / rank.
    seed: of everything; None takes a new one.
  """

  method: str = "full"
  freeze_encoder: bool = False
  prompt_shots: int = 0
  max_epochs: int = 100
  patience: int = 5
  batch: int = 32
  learning_rate: float = 3e-4
  warmup: int = 10
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  loss: LossOptions = LossOptions()
  select: str = "loss"
  scale: str = "rank"
  grid: int = 32
  rank: int = 8
  alpha: float = 16.0
  seed: int | None = 0

  def __post_init__(self):
    """Checks the options; raises InputError."""
    if self.method not in METHODS:
      raise InputError(f"method={self.method!r}: take one of {METHODS}")
    if self.select not in SELECT:
      raise InputError(f"select={self.select!r}: take one of {SELECT}")
    if self.select == "expected" and not self.loss.needs_grid:
      raise InputError(
        'select="expected" needs an expected_value or ranking loss: give one'
      )
    if self.scale not in SCALES:
      raise InputError(f"scale={self.scale!r}: take one of {SCALES}")
    for name in ("max_epochs", "patience", "batch", "rank", "grid"):
      arguments.integer(name, getattr(self, name), 1)
    for name in ("prompt_shots", "warmup"):
      arguments.integer(name, getattr(self, name), 0)
    for name in ("learning_rate", "weight_decay", "clip_norm", "alpha"):
      arguments.number(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class History:
  """What happened.

  Attributes:
    train_loss: mean of each epoch, nats a token.
    valid_loss: what `select` names, in front of the first epoch and behind
      each; empty without validation examples.
    best_epoch: whose parameters were kept; 0 are those it began with.
  """

  train_loss: tuple[float, ...]
  valid_loss: tuple[float, ...]
  best_epoch: int


def fine_tune(
  model: Model,
  params: Params,
  train: Dataset,
  valid: Dataset | None,
  options: FineTuneOptions,
  *,
  values: np.ndarray | None = None,
  valid_values: np.ndarray | None = None,
  mesh: jax.sharding.Mesh | None = None,
  on_epoch: Callable[[int, float, float | None], None] | None = None,
) -> tuple[Params, History]:
  """Adapts parameters to examples.

  Args:
    model: the model.
    params: to begin with; they are left as they are.
    train: examples.
    valid: decide when to stop, and which epoch is kept; None trains
      `max_epochs` and keeps the last.
    options: how.
    values: (N, O) targets of `train`, for losses over a grid.
    valid_values: those of `valid`, for select="expected".
    mesh: devices; None takes one.
    on_epoch: called with number, training loss and validation loss.

  Returns:
    The parameters, adapters merged into them, and the history.

  Raises:
    InputError: the loss is not finite: the learning rate is too high.
  """
  o = dataclasses.replace(options, seed=arguments.seed(options.seed))
  mesh = mesh or mesh_lib.data_mesh(1)
  parts = mesh_lib.row_parts(mesh)
  rows = max(parts, min(o.batch, len(train)) // parts * parts)
  per_epoch = max(1, -(-len(train) // rows))
  schedule, tx = _optimizer(o, o.max_epochs * per_epoch)
  trained, still, combine = _trainable(params, o)
  frozen = {"params": still}
  if o.loss.needs_grid:
    scale = Scale.fit(o.scale, values)
    frozen["grid"] = scale.grid(model.codec, o.grid)
    train = _scored(train, scale, values)
    if o.select == "expected" and valid is not None:
      valid = _scored(valid, scale, valid_values)
  frozen = mesh_lib.place(mesh, frozen)
  step = state_lib.jit_step(
    learn.make_step(model, tx, schedule, o.loss, combine=combine), mesh
  )
  evaluate = valid and _evaluation(model, mesh, valid, combine, o)
  state = state_lib.create_state(trained, tx, jax.random.key(o.seed))
  best, best_epoch = jax.tree.map(jnp.copy, state.params), 0
  train_loss, valid_loss = [], []
  if evaluate:
    valid_loss.append(evaluate(state.params, frozen))
  for epoch in range(1, o.max_epochs + 1):
    numbers = range((epoch - 1) * per_epoch, epoch * per_epoch)
    batches = (train.batch_at(number, rows, o.seed) for number in numbers)
    state, mean = _epoch(step, state, batches, frozen)
    train_loss.append(mean)
    told = f"the loss is {train_loss[-1]} in epoch {epoch}"
    _check(math.isfinite(train_loss[-1]), told, o)
    if evaluate:
      valid_loss.append(evaluate(state.params, frozen))
    if on_epoch:
      on_epoch(epoch, train_loss[-1], valid_loss[-1] if evaluate else None)
    if not evaluate or valid_loss[-1] < min(valid_loss[:-1]):
      best_epoch = epoch
      if evaluate or epoch == o.max_epochs:
        # Parameters are copied, because the next update takes the memory of the
        # state.
        best = jax.tree.map(jnp.copy, state.params)
    elif epoch - best_epoch >= o.patience:
      break
  # A finite loss does not say that the update after it was finite too.
  _check(bool(state_lib.all_finite(best)), "a weight is not finite", o)
  history = History(tuple(train_loss), tuple(valid_loss), best_epoch)
  return jax.jit(combine)(best, frozen["params"]), history


def _epoch(step, state, batches, frozen):
  """The state behind updates on all batches, and their mean loss."""
  losses = []
  for batch in batches:
    state, metrics = step(state, batch, frozen)
    losses.append(metrics["loss"])
  return state, float(sum(jax.device_get(losses))) / len(losses)


def _check(finite: bool, told: str, options: FineTuneOptions) -> None:
  if not finite:
    raise InputError(
      f"{told}: give a learning_rate below {options.learning_rate}"
    )


def _scored(examples: Dataset, scale: Scale, values: np.ndarray) -> Dataset:
  return dataclasses.replace(examples, scores=scale.scores(values))


def _evaluation(model, mesh, valid: Dataset, combine, options: FineTuneOptions):
  """Parameters to the number that decides."""
  parts = mesh_lib.row_parts(mesh)
  rows = -(-min(options.batch, len(valid)) // parts) * parts
  by_loss = options.select == "loss"
  losses = learn.make_evaluation(
    model,
    mesh,
    valid.whole(rows),
    options=LossOptions() if by_loss else options.loss,
    combine=combine,
  )
  name = "loss" if by_loss else "squared_error"
  return lambda trained, frozen: losses(trained, frozen)[name]


def _trainable(params: Params, options: FineTuneOptions):
  """What is trained, what stays, and how they become parameters."""
  trained, still = freezing.split(params, options.freeze_encoder)
  if options.method == "full":
    return jax.tree.map(jnp.copy, trained), still, freezing.join
  key = jax.random.key(options.seed)
  adapters = lora.init(trained, options.rank, key)
  scale = options.alpha / options.rank
  merge = lambda adapters, params: lora.merge(params, adapters, scale)
  return adapters, params, merge


def _optimizer(options: FineTuneOptions, num_steps: int):
  schedule = optimizer.learning_rate(
    "cosine",
    options.learning_rate,
    num_steps,
    warmup_steps=min(options.warmup, num_steps),
    final_share=0.1,
    decay_share=0.0,
  )
  return schedule, optimizer.adamw(
    schedule,
    beta1=0.9,
    beta2=0.99,
    eps=1e-8,
    weight_decay=options.weight_decay,
    clip_norm=options.clip_norm,
  )
