"""Supervised warm start: what an action does to its own token, by regression.

Windows of training text are scored once, each episode under one random
schedule, and kept with what the policy would have seen. The sensitivities are
then fitted to the tokens' divergences from the dense model by gamma deviance
(`research/sol/damage.py`), in several epochs over the same tokens: scoring them
costs far more than a look at them, and dropout of the inputs keeps the policy
from knowing them by heart. With any price it is then a policy.

Axis letters: W windows, E episodes of a window, n episodes, T steps, A actions,
D width of the LLM.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import transformer
from research.core import files
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core.state import TrainState
from research.sol import damage as damage_lib
from research.sol import policy as policy_lib
from research.sol import prefix as prefix_lib
from research.sol import random_schedules
from research.sol import rollout as rollout_lib
from research.sol.learn import Frozen, Method
from research.sol.observation import Observation

Tree = Any
type Samples = dict[str, Any]

# Share of the hidden state's and the embedding's channels that a step drops.
_DROPOUT = 0.3
WEIGHT_DECAY = 0.1


def score(
  method: Method,
  lm: transformer.Params,
  damage: jax.Array,
  log_price: jax.Array,
  tokens: jax.Array,
  key: jax.Array,
) -> Samples:
  """Plays one random schedule in every episode of windows `tokens` (W, S').

  Args:
    method: the method.
    lm: parameters of the frozen LLM.
    damage: (A, 3), which schedules are drawn around.
    log_price: (2,), the range of the prices that they are drawn at.
    tokens: the windows.
    key: of prices and schedules.

  Returns:
    By name, for n = W E episodes: "tokens" that were read, "action" and
    "previous" (n, T) int32, "hidden" (n, T, D) float16, "scalars" (n, T, 9),
    "spent" (n, T, 3), "divergence" (n, T) in nats, and "price" (n,).
  """
  setup, layout = method.setup, method.layout
  starts = jnp.asarray(layout.starts())
  starts = jnp.broadcast_to(starts[None], (tokens.shape[0], starts.size))
  low, high = log_price
  price_key, draw_key = jax.random.split(key)
  price = jnp.exp(
    low + (high - low) * jax.random.uniform(price_key, starts.shape)
  )
  actions = random_schedules.draw(
    method.policy.costs,
    damage_lib.mean_gains(damage),
    price,
    layout.horizon,
    draw_key,
  )
  # The pass also covers the last episode, so that all dense predictions come
  # from one pass.
  prefix = setup.build_prefix(lm, tokens, layout.context)
  dense = prefix.hidden[:, layout.context :]
  dense = dense.reshape(*starts.shape, layout.horizon, -1)
  rollout = rollout_lib.score_block(
    setup,
    lm,
    prefix,
    tokens,
    starts,
    actions,
    record=True,
    dense=dense,
  )
  seen = rollout.observations
  inputs, _ = prefix_lib.episode_tokens(tokens, starts, layout.horizon)
  samples = {
    "tokens": inputs,
    "action": actions,
    "previous": seen.previous,
    "hidden": seen.hidden.astype(jnp.float16),
    "scalars": seen.scalars,
    "spent": seen.spent,
    "divergence": rollout.divergence,
    "price": price,
  }
  return {k: v.reshape(-1, *v.shape[2:]) for k, v in samples.items()}


def collect(
  score_batch: Callable[[jax.Array, jax.Array], Samples],
  batches: Callable[[int], np.ndarray],
  rounds: int,
  seed: int,
  folder: pathlib.Path,
  belongs_to: Any,
  progress: Callable[[int], None] = lambda episodes: None,
) -> Samples:
  """Scores `rounds` batches; a run that is killed loses one of them at most.

  Args:
    score_batch: `score`, compiled, from windows and a key.
    batches: from the round to its windows (W, S').
    rounds: how many.
    seed: of the schedules.
    folder: keeps every round's samples in a file.
    belongs_to: what the samples are made for, as `files.digest` takes it.
    progress: called with the episodes that have just been scored.

  Returns:
    All samples in NumPy.
  """
  parts = []
  for number in range(rounds):

    def make(number=number) -> Samples:
      key = jax.random.fold_in(jax.random.key(seed), number)
      return mesh_lib.to_host(score_batch(jnp.asarray(batches(number)), key))

    owner = {"for": belongs_to, "seed": seed, "round": number}
    parts.append(files.kept(folder / f"{number:05d}.npz", owner, make))
    progress(len(parts[-1]["price"]))
  return {
    name: np.concatenate([part[name] for part in parts]) for name in parts[0]
  }


def minibatches(samples: Samples, size: int) -> Callable[[int], Samples]:
  """Pure function from the step to `size` episodes, each once an epoch."""
  count = len(samples["price"])
  size = min(size, count)
  per_epoch = count // size

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return np.random.default_rng((2, epoch)).permutation(count)

  def batch_at(step: int) -> Samples:
    epoch, at = divmod(step, per_epoch)
    chosen = order(epoch)[at * size : (at + 1) * size]
    return {name: value[chosen] for name, value in samples.items()}

  return batch_at


def steps_of(samples: Samples, size: int, epochs: int) -> int:
  """Steps of so many epochs."""
  count = len(samples["price"])
  return epochs * (count // min(size, count))


def observations(method: Method, lm: Tree, samples: Samples) -> Observation:
  """What the policy saw, (n, 1, T, ...), not standardised."""
  model = transformer.bind(method.setup.config, lm)
  shape = samples["tokens"].shape
  steps = jnp.arange(shape[1], dtype=jnp.int32)
  alone = lambda x: x[:, None]
  return Observation(
    hidden=alone(samples["hidden"].astype(jnp.float32)),
    embed=alone(model.embed(samples["tokens"])),
    scalars=alone(samples["scalars"]),
    drift=jnp.zeros((shape[0], 1, shape[1])),
    previous=alone(samples["previous"]),
    spent=alone(samples["spent"]),
    step=alone(jnp.broadcast_to(steps[None], shape)),
  )


def make_step(
  method: Method, tx: optax.GradientTransformation
) -> Callable[[TrainState, Samples, Frozen], tuple[TrainState, dict]]:
  """Builds `(state, samples, frozen) -> (state, metrics)`; see `learn`."""

  def step(state, samples, frozen):
    stats = frozen.stats
    seen = stats.apply(observations(method, frozen.lm, samples))
    keys = jax.random.split(state_lib.step_key(state))

    def dropped(x, key):
      kept = jax.random.bernoulli(key, 1 - _DROPOUT, x.shape)
      return jnp.where(kept, x / (1 - _DROPOUT), 0.0)

    seen = dataclasses.replace(
      seen,
      hidden=dropped(seen.hidden, keys[0]),
      embed=dropped(seen.embed, keys[1]),
    )
    price = samples["price"][:, None]
    mean = stats.damage[samples["action"]]
    drawn = random_schedules.mean_damage(
      method.policy.costs, damage_lib.mean_gains(stats.damage), price
    )

    def loss_fn(params):
      model = policy_lib.bind(method.policy, params)
      sensitivity = model(seen, price[..., None], stats.damage)[1]
      if method.policy.hold > 1:
        # What is seen at a decision says how all tokens are damaged that it
        # holds for.
        steps = jnp.arange(sensitivity.shape[2])
        sensitivity = sensitivity[:, :, steps - steps % method.policy.hold]
      own = jnp.sum(mean * sensitivity[:, 0], axis=-1)
      loss = damage_lib.divergence_loss(samples["divergence"], own, drawn)
      return loss, {"predicted": jnp.mean(own)}

    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    plain = damage_lib.divergence_loss(
      samples["divergence"], jnp.sum(mean, axis=-1), drawn
    )
    # This number is below zero where the policy knows more than the mean
    # damage.
    metrics = aux | {
      "loss": loss,
      "over_mean": loss - plain,
      "divergence": jnp.mean(samples["divergence"]),
    }
    return state_lib.apply_gradients(state, grads, tx), metrics

  return step


def measure_stats(
  method: Method, lm: Tree, damage: jax.Array, samples: Samples
) -> policy_lib.InputStats:
  """Statistics of the policy's inputs under random schedules."""
  seen = observations(method, lm, samples)
  return policy_lib.InputStats.measure(seen, damage)
