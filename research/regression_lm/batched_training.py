"""Many small models trained at once: one compiled program, a member an axis.

Members differ in weights, in the rows they are given and in the grid of their
expected values, not in shape. A model for few examples is so small that a
device waits for the host; here some updates of all members are one call. Texts
are tokenized once, in several orders of their fields, and a task's name is set
in front of them on the device.

Shapes by axis letter: M members, S updates, B examples of an update, R texts,
W views of a text, L text tokens, Q tasks, P tokens of a task's name, N pairs of
text and number, T target tokens, G numbers of a grid.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import regression_lm
from models.regression_lm import Params
from models.tokenizer import Tokenizer
from research.core import optimizer
from research.core import state as state_lib
from research.core.state import TrainState
from research.regression_lm import expected, learn, token_batches
from research.regression_lm.expected import Grid
from research.regression_lm.likelihood import Model
from research.regression_lm.options import LossOptions

# Updates of one call of the device.
_CHUNK = 50


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
  """Tokens of texts and of the tasks' names.

  Attributes:
    tokens: (R, W, L) int32.
    lengths: (R, W) int32.
    names: (Q, P) int32.
    name_lengths: (Q,) int32.
  """

  tokens: jax.Array
  lengths: jax.Array
  names: jax.Array
  name_lengths: jax.Array

  @classmethod
  def read(
    cls,
    tokenizer: Tokenizer,
    views: Sequence[Sequence[str]],
    names: Sequence[str],
    max_length: int,
  ) -> "Pool":
    """Tokenizes R texts in W views each, and Q names.

    Raises:
      InputError: a text does not do.
    """
    flat = [text for several in views for text in several]
    texts = token_batches.read_texts(tokenizer, flat, max_length)
    tags = token_batches.read_texts(tokenizer, names, max_length)
    shape = (len(views), len(views[0]))
    tokens, lengths = _whole(texts)
    tag_tokens, tag_lengths = _whole(tags)
    return cls(
      jnp.asarray(tokens.reshape(*shape, -1)),
      jnp.asarray(lengths.reshape(shape)),
      jnp.asarray(tag_tokens),
      jnp.asarray(tag_lengths),
    )

  def batch(
    self, rows: jax.Array, views: jax.Array, tasks: jax.Array
  ) -> dict[str, jax.Array]:
    """Tokens (B, P + L) and lengths (B,) of names with texts behind them."""
    text, name = self.tokens[rows, views], self.names[tasks]
    before = self.name_lengths[tasks][:, None]
    place = jnp.arange(text.shape[1] + name.shape[1])[None]
    take = lambda x, at: jnp.take_along_axis(
      x, jnp.clip(at, 0, x.shape[1] - 1), axis=1
    )
    shape = (text.shape[0], place.shape[1])
    tokens = jnp.where(
      place < before,
      take(name, jnp.broadcast_to(place, shape)),
      take(text, place - before),
    )
    return {
      "tokens": tokens,
      "lengths": self.lengths[rows, views] + before[:, 0],
    }


def _whole(texts: token_batches.Texts) -> tuple[np.ndarray, np.ndarray]:
  every = np.arange(len(texts.lengths))
  return texts.rows(every, int(texts.lengths.max()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
  """N numbers with the texts and tasks they belong to.

  Attributes:
    rows: (N,) int32, text of each.
    tasks: (N,) int32.
    targets: (N, T) int32.
    scores: (N, 1) float32 for losses over a grid.
  """

  rows: jax.Array
  tasks: jax.Array
  targets: jax.Array
  scores: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
  """How members are trained.

  Attributes:
    steps: updates.
    batch: examples of one, of every member.
    learning_rate: peak; it falls to a tenth by a cosine.
    warmup: updates of linear warmup.
    weight_decay: of matrices.
    clip_norm: of the gradient of a member; 0 leaves it.
    loss: what is minimised.
  """

  steps: int
  batch: int
  learning_rate: float
  warmup: int = 10
  weight_decay: float = 0.05
  clip_norm: float = 1.0
  loss: LossOptions = LossOptions()

  def rates(self) -> np.ndarray:
    """The learning rate of every update, (steps,) float32."""
    schedule = optimizer.learning_rate(
      "cosine",
      self.learning_rate,
      self.steps,
      warmup_steps=min(self.warmup, self.steps),
      final_share=0.1,
      decay_share=0.0,
    )
    return np.asarray(jax.vmap(schedule)(jnp.arange(self.steps)), np.float32)


def keys_of(seeds: Sequence[int]) -> jax.Array:
  """A key for each member, (M,)."""
  return jnp.stack([jax.random.key(seed) for seed in seeds])


@functools.partial(jax.jit, static_argnums=0)
def init(model: Model, keys: jax.Array) -> Params:
  """Random weights of M members by keys (M,), on axis 0 of every array."""
  return jax.vmap(lambda key: regression_lm.init(model.config, key))(keys)


def update(
  model: Model,
  tx: optax.GradientTransformation,
  loss: LossOptions,
  members: tuple[Params, optax.OptState],
  batch: learn.Batch,
  grids: Grid,
  keys: jax.Array,
  rate: jax.Array | float = 1.0,
) -> tuple[tuple[Params, optax.OptState], dict[str, jax.Array]]:
  """One update of M members; all but `rate` has them on axis 0.

  Args:
    model: of all.
    tx: the optimizer of each.
    loss: what is minimised.
    members: their parameters, and what the optimizer remembers of them.
    batch: (M, ...) as `learn.loss_sums` takes it.
    grids: (M, O, G, ...).
    keys: (M,) of dropout.
    rate: factor of the change.

  Returns:
    The members, and the sums (M,) of `learn.loss_sums`.
  """

  def one(params, memory, batch, grid, key):
    grads, sums = jax.grad(
      lambda p: learn.loss_sums(
        model, p, batch, loss, grid, key if loss.dropout else None
      ),
      has_aux=True,
    )(params)
    count = jnp.maximum(sums["examples"], 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    changes, memory = tx.update(grads, memory, params)
    changes = jax.tree.map(lambda x: x * rate, changes)
    return (optax.apply_updates(params, changes), memory), sums

  return jax.vmap(one)(*members, batch, grids, keys)


def make_step(
  model: Model,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  loss: LossOptions,
) -> Callable[[TrainState, learn.Batch, Grid], tuple[TrainState, dict]]:
  """`update` for `state.jit_step`, as `learn.make_step` is for one model.

  Args:
    model: of all members.
    tx: the optimizer of each.
    schedule: its learning rate, for the metrics.
    loss: what is minimised.

  Returns:
    `(state, batch, grids) -> (state, metrics)`, members on axis 0.
  """

  def step(state: TrainState, batch, grids):
    count = batch["targets"].shape[0]
    keys = jax.random.split(state_lib.step_key(state), count)
    members, sums = update(
      model, tx, loss, (state.params, state.opt_state), batch, grids, keys
    )
    total = sums.pop("examples").sum()
    metrics = jax.tree.map(lambda part: part.sum() / total, sums)
    metrics["learning_rate"] = schedule(state.step)
    params, opt_state = members
    new = dataclasses.replace(
      state, step=state.step + 1, params=params, opt_state=opt_state
    )
    return new, metrics

  return step


def order(
  members: Sequence[np.ndarray], steps: int, batch: int, seeds: Sequence[int]
) -> np.ndarray:
  """Pairs (M, steps, B) of every update: shuffled epochs of a member's own.

  Args:
    members: M arrays of indices into the pairs.
    steps: updates.
    batch: B.
    seeds: M, of the order.
  """
  found = np.empty((len(members), steps * batch), np.int32)
  for place, (own, seed) in enumerate(zip(members, seeds)):
    generator = np.random.default_rng((seed, 5))
    epochs = -(-steps * batch // len(own))
    stream = [generator.permutation(own) for _ in range(epochs)]
    found[place] = np.concatenate(stream)[: steps * batch]
  return found.reshape(len(members), steps, batch)


def train(
  model: Model,
  params: Params,
  pool: Pool,
  pairs: Pairs,
  grids: Grid,
  members: Sequence[np.ndarray],
  updates: Updates,
  *,
  seeds: Sequence[int],
  say: Callable[[str], None] = lambda line: None,
) -> Params:
  """Trains all members on their own pairs.

  Args:
    model: of all.
    params: of M members, on axis 0; they are left as they are.
    pool: texts.
    pairs: of all members.
    grids: of the members, (M, 1, G, ...).
    members: M arrays of indices into `pairs`.
    updates: how.
    seeds: M, of the order, the views and dropout.
    say: told how far it is.
  """
  tx = _transformation(updates.weight_decay, updates.clip_norm)
  state = (jax.tree.map(jnp.copy, params), jax.vmap(tx.init)(params))
  keys = keys_of(seeds)
  rates = updates.rates()
  indices = order(members, updates.steps, updates.batch, seeds)
  for start in range(0, updates.steps, _CHUNK):
    # The last call is filled with updates at rate 0, so that all compile once.
    part = np.arange(start, start + _CHUNK)
    there = part < updates.steps
    part = np.minimum(part, updates.steps - 1)
    state, losses = _run(
      model,
      updates.loss,
      (updates.weight_decay, updates.clip_norm),
      state,
      pool,
      pairs,
      grids,
      keys,
      (
        jnp.asarray(indices[:, part].swapaxes(0, 1)),
        jnp.asarray(np.where(there, rates[part], 0.0)),
        jnp.asarray(part),
      ),
    )
    done = min(start + _CHUNK, updates.steps)
    if done % (10 * _CHUNK) == 0 or done == updates.steps:
      mean = float(losses[there].mean())
      say(f"{done} of {updates.steps} updates, loss {mean:.3f}")
  return state[0]


@functools.lru_cache(maxsize=16)
def _transformation(decay: float, clip: float) -> optax.GradientTransformation:
  """AdamW at rate 1: its update is proportional to the rate."""
  return optimizer.adamw(
    lambda step: 1.0,
    beta1=0.9,
    beta2=0.99,
    eps=1e-8,
    weight_decay=decay,
    clip_norm=clip,
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _run(model, loss, decay_and_clip, state, pool, pairs, grids, keys, updates):
  """Some updates of all members: indices (S, M, B), rates and numbers (S,)."""
  tx = _transformation(*decay_and_clip)

  def batch_of(key, own):
    view_key, drop_key = jax.random.split(key)
    count = pool.tokens.shape[1]
    views = jax.random.randint(view_key, own.shape, 0, count)
    batch = pool.batch(pairs.rows[own], views, pairs.tasks[own])
    batch["targets"] = pairs.targets[own]
    batch["scores"] = pairs.scores[own]
    return batch, drop_key

  def step(state, inputs):
    own, rate, number = inputs
    now = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    batch, drop_keys = jax.vmap(batch_of)(now, own)
    state, sums = update(model, tx, loss, state, batch, grids, drop_keys, rate)
    found = sums["loss"] / jnp.maximum(sums["examples"], 1.0)
    return state, found.mean()

  return jax.lax.scan(step, state, updates)


def chances(
  model: Model,
  params: Params,
  pool: Pool,
  grids: Grid,
  rows: np.ndarray,
  tasks: np.ndarray,
  *,
  views: int = 1,
  batch: int = 256,
) -> np.ndarray:
  """Probabilities over its grid by every member, (M, R, G), R = len(rows).

  Args:
    model: of all.
    params: of M members.
    pool: texts.
    grids: of the members, (M, 1, G, ...).
    rows: (M, R) of the pool's texts.
    tasks: (M,) whose name stands in front.
    views: orders of the text whose probabilities are averaged.
    batch: texts of one call.
  """
  count = rows.shape[1]
  found = []
  for start in range(0, count, batch):
    part = np.minimum(np.arange(start, start + batch), count - 1)
    arguments = (pool, grids, jnp.asarray(rows[:, part]), jnp.asarray(tasks))
    several = [_chances(model, params, *arguments, v) for v in range(views)]
    found.append(np.mean(jax.device_get(several), axis=0))
  return np.concatenate(found, axis=1)[:, :count]


@functools.partial(jax.jit, static_argnums=0)
def _chances(model, params, pool, grids, rows, tasks, view):
  def member(params, grid, rows, task):
    full = lambda value: jnp.full(rows.shape, value, jnp.int32)
    batch = pool.batch(rows, full(view), full(task))
    memory = regression_lm.encode(
      model.config,
      params,
      batch["tokens"],
      batch["lengths"],
      compute=model.compute,
    )
    targets = jnp.zeros((len(rows), model.codec.length), jnp.int32)
    found = expected.grid_logprobs(model, params, memory, targets, grid)
    there = jnp.isfinite(grid.scores)[None]
    return jax.nn.softmax(jnp.where(there, found, -jnp.inf), axis=-1)[:, 0]

  return jax.vmap(member)(params, grids, rows, tasks)
