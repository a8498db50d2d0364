"""Supervised warm start: regress counterfactual gains of random schedules.

Axis letters: W windows, E episodes, K schedules of an episode, T steps, A
actions. Each episode is scored under K random schedules in one block forward.
The reward to go of a token, centred over the K schedules, is the counterfactual
gain of the action it got there: its own-step gain and what it does to later
tokens. The gain head is fitted to it, centred alike, by squared error; with
any price it is then a policy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.core import state as state_lib
from research.core.state import TrainState
from research.sol import credit, learn
from research.sol import policy as policy_lib
from research.sol import reward as reward_lib
from research.sol import rollout as rollout_lib
from research.sol.learn import Method

Tree = Any


def random_actions(method: Method, windows: int, key: jax.Array) -> jax.Array:
  """Schedules (W, R, T), drawn independently at every step.

  All schedules of an episode share one tilt towards dear or cheap actions, so
  that all budgets are seen; within the group, actions of different steps stay
  independent, so that no gain is credited to its neighbours.
  """
  tilt_key, draw_key = jax.random.split(key)
  costs = jnp.asarray(method.policy.costs)
  spread = jnp.maximum(jnp.std(costs), 1e-6)
  costs = (costs - jnp.mean(costs)) / spread
  tilt = jax.random.normal(tilt_key, (windows, method.layout.episodes))
  tilt = jnp.repeat(tilt, method.group_size, axis=1)
  logits = tilt[..., None] * costs[None, None]
  shape = (method.layout.horizon, *tilt.shape)
  draws = jax.random.categorical(draw_key, logits[None], axis=-1, shape=shape)
  return jnp.moveaxis(draws, 0, -1).astype(jnp.int32)


def score_random(
  method: Method, frozen: Tree, batch: Tree, key: jax.Array
) -> rollout_lib.Rollout:
  """Scores random schedules of a batch, with observations."""
  tokens = batch["tokens"]
  starts = learn.starts_of(method, tokens.shape[0])
  return rollout_lib.score_block(
    method.setup,
    frozen["lm"],
    learn.prefix_of(method, frozen, batch),
    tokens,
    starts,
    random_actions(method, tokens.shape[0], key),
    record=True,
  )


def make_step(
  method: Method, tx: optax.GradientTransformation
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, dict]]:
  """Builds `(state, batch, frozen) -> (state, metrics)`; see `learn`."""

  def step(state, batch, frozen):
    score_key, goal_key = jax.random.split(state_lib.step_key(state))
    tokens = batch["tokens"]
    rollout = score_random(method, frozen, batch, score_key)
    starts = learn.starts_of(method, tokens.shape[0])
    seen = learn.full_observations(method, frozen, tokens, starts, rollout)
    goal = learn.draw_goals(
      method, frozen["log_price"], tokens.shape[0], goal_key
    )
    target = centred_gain(method, rollout)
    actions = learn.grouped(method, rollout.actions)

    def loss_fn(params):
      model = policy_lib.bind(method.policy, params)
      gains = learn.grouped(method, model(seen, goal)[1])
      taken = jnp.take_along_axis(gains, actions[..., None], axis=-1)[..., 0]
      taken = taken - jnp.mean(taken, axis=1, keepdims=True)
      error = jnp.mean(jnp.square(taken - target))
      covariance = jnp.mean(taken * target)
      scale = jnp.sqrt(jnp.mean(jnp.square(taken)) + 1e-12)
      scale = scale * jnp.sqrt(jnp.mean(jnp.square(target)) + 1e-12)
      return error, {"correlation": covariance / scale}

    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics = aux | {
      "loss": loss,
      "log_p": jnp.mean(rollout.log_p),
      "target_std": jnp.std(target),
    }
    return state_lib.apply_gradients(state, grads, tx), metrics

  return step


def centred_gain(method: Method, rollout: rollout_lib.Rollout) -> jax.Array:
  """Reward to go (W E, K, T), centred over the K schedules."""
  rewards = learn.grouped(method, rollout.log_p)
  if method.credit == "residual":
    spent = rollout_lib.action_costs(method.setup.table)[rollout.actions]
    returns = credit.residual_to_go(
      rewards, learn.grouped(method, spent), method.gamma
    )
  else:
    returns = reward_lib.returns_to_go(rewards, method.gamma)
  return returns - jnp.mean(returns, axis=1, keepdims=True)


def measure_stats(
  method: Method, frozen: Tree, batch: Tree, key: jax.Array
) -> policy_lib.InputStats:
  """Input statistics under random schedules of one batch."""
  identity = policy_lib.InputStats.identity(method.policy.lm_width)
  frozen = dict(frozen) | {"stats": identity}
  tokens = batch["tokens"]
  rollout = score_random(method, frozen, batch, key)
  starts = learn.starts_of(method, tokens.shape[0])
  return policy_lib.InputStats.measure(
    learn.full_observations(method, frozen, tokens, starts, rollout)
  )


def with_mean_gain(
  method: Method, params: Tree, frozen: Tree, batch: Tree, key: jax.Array
) -> tuple[Tree, jax.Array]:
  """Starts the gain head at the mean gains under random schedules.

  Args:
    method: the method.
    params: random policy parameters.
    frozen: see `learn.make_step`.
    batch: windows to measure on.
    key: of the schedules.

  Returns:
    The parameters, and the mean gain of every action (A,) in nats above the
    least.
  """
  rollout = score_random(method, frozen, batch, key)
  basis = jnp.asarray(method.setup.table.basis())
  features = learn.grouped(method, basis[rollout.actions])
  features = features - jnp.mean(features, axis=1, keepdims=True)
  x = features.reshape(-1, basis.shape[1])
  y = centred_gain(method, rollout).reshape(-1)
  ridge = 1e-3 * x.shape[0] * jnp.eye(basis.shape[1])
  weights = jnp.linalg.solve(x.T @ x + ridge, x.T @ y)
  gains = basis @ weights
  head = dict(params["head"]) | {"bias": weights}
  return dict(params) | {"head": head}, gains - jnp.min(gains)
