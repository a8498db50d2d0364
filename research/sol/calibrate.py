"""From an asked budget to a controller's knob, on training text.

Axis letters: W windows, E episodes, P points, R = P E rollouts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research.core import mesh as mesh_lib
from research.sol import rollout as rollout_lib
from research.sol.controllers import ThresholdGoal, TwoLevels
from research.sol.rollout import Controller, Rollout, Setup

Tree = Any


@functools.partial(jax.jit, static_argnums=(0, 4))
def _rollout(setup, params, tokens, starts, controller, inner, goals):
  length = tokens.shape[1] - 1 - setup.horizon
  prefix = setup.build_prefix(params, tokens[:, : length + 1], 2)
  result = rollout_lib.scan(
    setup,
    params,
    prefix,
    tokens,
    starts,
    rollout_lib.Play(controller=controller, params=inner, goal=goals),
    jax.random.key(0),
  )
  return result.actions, result.log_p, result.extras


def run_points(
  setup: Setup,
  params: transformer.Params,
  windows: np.ndarray,
  starts: np.ndarray,
  controller: Controller,
  inner: Tree,
  goals: Tree,
  *,
  batch: int,
) -> Rollout:
  """Runs a controller at P points over calibration windows.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    windows: (W, S') tokens.
    starts: (E,) first tokens of the episodes.
    controller: the controller.
    inner: its parameters.
    goals: pytree with leading axis P.
    batch: windows a call; W is cut down to a multiple of it.

  Returns:
    The rollout with NumPy arrays (P, W E, T, ...).
  """
  count = jax.tree.leaves(goals)[0].shape[0]
  episodes = len(starts)
  batch = min(batch, len(windows))
  spread = lambda x: jnp.broadcast_to(
    jnp.repeat(jnp.asarray(x), episodes, axis=0)[None],
    (batch, count * episodes, *np.shape(x)[1:]),
  )
  goals = jax.tree.map(spread, goals)
  tiled = jnp.asarray(np.tile(starts, (batch, count)).astype(np.int32))
  pieces = []
  for at in range(0, len(windows) - batch + 1, batch):
    tokens = jnp.asarray(windows[at : at + batch])
    piece = _rollout(setup, params, tokens, tiled, controller, inner, goals)
    pieces.append(jax.tree.map(np.asarray, mesh_lib.to_host(piece)))

  def join(*parts):
    x = np.concatenate(parts)
    x = x.reshape(x.shape[0], count, episodes, *x.shape[2:])
    x = np.moveaxis(x, 1, 0)
    return x.reshape(count, -1, *x.shape[3:])

  actions, log_p, extras = jax.tree.map(join, *pieces)
  return Rollout(actions=actions, log_p=log_p, observations=None, extras=extras)


def knob_for(
  asked: Sequence[float], knobs: np.ndarray, spent: np.ndarray
) -> np.ndarray:
  """Reads the knob that spends what is asked off a measured curve.

  Args:
    asked: budgets.
    knobs: (P,) positive, increasing; interpolated in the logarithm.
    spent: (P,) what each knob spent; falling but for noise, which is levelled.

  Returns:
    A knob for each budget, clipped to the measured range.
  """
  falling = 0.5 * (
    np.minimum.accumulate(spent) + np.maximum.accumulate(spent[::-1])[::-1]
  )
  logs = np.interp(asked, falling[::-1], np.log(knobs)[::-1])
  return np.exp(logs)


def thresholds_for(
  run: Callable[[ThresholdGoal], np.ndarray],
  levels: Sequence[TwoLevels],
  shares: np.ndarray,
  first_scores: np.ndarray,
  *,
  rounds: int = 3,
) -> ThresholdGoal:
  """Thresholds whose shares of upper levels are met on calibration text.

  Actions change the scores they are compared with, so the quantiles are taken
  again under the thresholds themselves, a few times.

  Args:
    run: plays a goal with leading axis P, returns scores (P, n, 3).
    levels: P pairs of levels.
    shares: (P, 3) share of upper levels that is wanted.
    first_scores: (n, 3) scores to begin with.
    rounds: fixed-point rounds.

  Returns:
    The goal, with leading axis P.
  """
  lookup = np.stack([one.lookup for one in levels])
  scores = np.broadcast_to(first_scores, (len(levels), *first_scores.shape))
  for done in range(rounds + 1):
    thresholds = np.stack(
      [_upper_quantiles(s, p) for s, p in zip(scores, shares, strict=True)]
    )
    goal = ThresholdGoal(thresholds.astype(np.float32), lookup)
    if done < rounds:
      scores = run(goal)
  return goal


def _upper_quantiles(scores: np.ndarray, shares: np.ndarray) -> np.ndarray:
  """(3,) thresholds that the upper `shares` (3,) of (n, 3) scores reach."""
  out = np.empty(3)
  for axis in range(3):
    share = shares[axis]
    if share >= 1:
      out[axis] = -np.inf
    elif share <= 0:
      out[axis] = np.inf
    else:
      out[axis] = np.quantile(scores[:, axis], 1 - share)
  return out


def bracket(
  levels: Sequence[TwoLevels], width: float
) -> tuple[list[TwoLevels], np.ndarray]:
  """Each pair of levels twice, with shares `width` below and above: (2P, 3)."""
  doubled, shares = [], []
  for one in levels:
    for sign in (-1, 1):
      moving = (one.shares > 0) & (one.shares < 1)
      share = one.shares + sign * width * moving
      doubled.append(one)
      shares.append(np.clip(share, 0, 1))
  return doubled, np.array(shares)
