"""Supervised warm start: regress counterfactual gains of random schedules.

Axis letters: W windows, E episodes, K schedules of an episode, T steps, A
actions. Each episode is scored under K random schedules in one block forward.
With rewards from labels, the reward to go of a token, centred over the K
schedules, is the counterfactual gain of the action it got there: its own-step
gain and what it does to later tokens. The gain head is fitted to it, centred
alike, by squared error. With divergences, which are a token's damage with
far less noise, the head is fitted to those of the own step by their gamma
deviance. With any price it is then a policy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.core import state as state_lib
from research.core.state import TrainState
from research.sol import behaviour, credit, learn
from research.sol import damage as damage_lib
from research.sol import policy as policy_lib
from research.sol import reward as reward_lib
from research.sol import rollout as rollout_lib
from research.sol.learn import Method

Tree = Any


def score_random(
  method: Method, frozen: Tree, batch: Tree, goal: jax.Array, key: jax.Array
) -> rollout_lib.Rollout:
  """Scores random schedules of a batch, with observations.

  Args:
    method: the method.
    frozen: see `learn.make_step`; "damage" (A, 3) is what schedules are
      drawn around.
    batch: windows.
    goal: (W, R, 1) prices.
    key: of the schedules.
  """
  tokens = batch["tokens"]
  starts = learn.starts_of(method, tokens.shape[0])
  prefix = learn.prefix_of(method, frozen, batch)
  actions = behaviour.draw(
    method.policy.costs,
    damage_lib.mean_gains(frozen["damage"]),
    goal[..., 0],
    method.layout.horizon,
    key,
  )
  return rollout_lib.score_block(
    method.setup,
    frozen["lm"],
    prefix,
    tokens,
    starts,
    actions,
    record=True,
    dense=learn.dense_of(method, frozen["lm"], prefix, tokens),
  )


def make_step(
  method: Method, tx: optax.GradientTransformation
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, dict]]:
  """Builds `(state, batch, frozen) -> (state, metrics)`; see `learn`."""

  def step(state, batch, frozen):
    score_key, goal_key = jax.random.split(state_lib.step_key(state))
    tokens = batch["tokens"]
    goal = learn.draw_goals(
      method, frozen["log_price"], tokens.shape[0], goal_key
    )
    rollout = score_random(method, frozen, batch, goal, score_key)
    starts = learn.starts_of(method, tokens.shape[0])
    seen = learn.full_observations(method, frozen, tokens, starts, rollout)
    target = centred_gain(method, rollout)
    drawn = (
      method.policy.costs,
      damage_lib.mean_gains(frozen["damage"]),
      goal[..., 0],
    )
    scale = behaviour.gain_scale(*drawn)
    weight = learn.grouped(method, scale)[..., None] ** -2
    played = rollout.actions[..., None]

    def loss_fn(params):
      model = policy_lib.bind(method.policy, params)
      gains = model(seen, goal, frozen["stats"].damage)[1]
      own = jnp.take_along_axis(gains, played, axis=-1)[..., 0]
      taken = learn.grouped(method, own)
      taken = taken - jnp.mean(taken, axis=1, keepdims=True)
      mean = lambda x: jnp.mean(weight * x)
      if method.reward == "divergence":
        error = damage_lib.divergence_loss(
          rollout.divergence, -own, behaviour.mean_damage(*drawn)[..., None]
        )
      else:
        error = mean(jnp.square(taken - target))
      covariance = mean(taken * target)
      norms = mean(jnp.square(taken)) * mean(jnp.square(target))
      return error, {"correlation": covariance * jax.lax.rsqrt(norms + 1e-12)}

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
  rewards = learn.grouped(method, rollout.rewards)
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
  damage = frozen["damage"]
  identity = policy_lib.InputStats.identity(method.policy.lm_width, damage)
  frozen = dict(frozen) | {"stats": identity}
  tokens = batch["tokens"]
  goal = learn.draw_goals(method, frozen["log_price"], tokens.shape[0], key)
  if method.budget == "targets":
    goal = jnp.ones_like(goal[..., :1])
  rollout = score_random(method, frozen, batch, goal, key)
  starts = learn.starts_of(method, tokens.shape[0])
  return policy_lib.InputStats.measure(
    learn.full_observations(method, frozen, tokens, starts, rollout), damage
  )
