"""Baselines: schedules fixed in advance, and thresholds on what is seen.

All of them choose, on each axis, between two neighbouring levels, and are
matched to a realised mean on every axis, as the published baselines are.
Axis letters: W windows, R rollouts, T steps, A actions; the three axes are
kappa, rho and bits, in this order.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.sol.actions import ActionTable
from research.sol.observation import Observation
from research.sol.rollout import Controller

AXES = ("kappa", "rho", "bits")


@dataclasses.dataclass(frozen=True)
class TwoLevels:
  """Two neighbouring levels on each axis, mixed to given means.

  Attributes:
    lookup: (8,) int32, the action of each corner; index 4 i + 2 j + k for
      the upper (1) or lower (0) level of kappa, rho and bits.
    shares: (3,) share of tokens that take the upper level.
  """

  lookup: np.ndarray
  shares: np.ndarray

  @classmethod
  def around(cls, table: ActionTable, means: np.ndarray) -> "TwoLevels":
    """Levels around `means` (3,), given as (kappa, rho, bits / 16)."""
    index = {
      point: i
      for i, point in enumerate(
        zip(table.kappa, table.rho, table.bits, strict=True)
      )
    }
    pairs, shares = [], []
    for axis, mean in zip(AXES, means, strict=True):
      mean = float(mean) * (16 if axis == "bits" else 1)
      levels = sorted(set(getattr(table, axis)))
      at = int(np.searchsorted(levels, mean, side="right")) - 1
      at = min(max(at, 0), max(len(levels) - 2, 0))
      low, high = levels[at], levels[min(at + 1, len(levels) - 1)]
      pairs.append((low, high))
      width = high - low
      shares.append(np.clip((mean - low) / width, 0, 1) if width else 1.0)
    lookup = [
      index[(k, r, b)] for k in pairs[0] for r in pairs[1] for b in pairs[2]
    ]
    return cls(np.array(lookup, np.int32), np.array(shares, np.float64))

  def pick(self, upper: np.ndarray) -> np.ndarray:
    """Actions (...) where `upper` (..., 3) says which axes are high."""
    corner = upper.astype(np.int32) @ np.array([4, 2, 1], np.int32)
    return self.lookup[corner]


def round_robin(levels: TwoLevels, shape: tuple[int, ...]) -> np.ndarray:
  """Fixed allocation: the upper level on every n-th token, int32 `shape`.

  The pattern runs through all episodes in reading order, so that the means
  are met to one part in the number of tokens. Axes are shifted against each
  other by the golden ratio, so that they do not all rise on the same tokens.
  """
  count = int(np.prod(shape))
  token = np.arange(count)[:, None]
  phase = np.modf(np.arange(3) * 0.6180339887)[0]
  share = levels.shares + 1e-12
  upper = np.floor((token + 1) * share + phase) > np.floor(
    token * share + phase
  )
  return levels.pick(upper).reshape(shape)


def random_schedule(
  levels: TwoLevels, shape: tuple[int, ...], seed: int
) -> np.ndarray:
  """Random two-point mixes, permuted within every episode, int32 `shape`.

  The last axis is an episode's T steps. Each episode and axis has the upper
  level on floor or ceil of share * T of its steps (drawn so that the mean is
  met), at random places.
  """
  generator = np.random.default_rng(seed)
  horizon = shape[-1]
  places = generator.random((*shape, 3)).argsort(axis=-2)
  target = levels.shares * horizon
  episodes = int(np.prod(shape[:-1]))
  # Systematic sampling of floor or ceil keeps the overall mean to 1 / tokens.
  order = generator.permuted(
    np.tile(np.arange(episodes)[:, None], (1, 3)), axis=0
  )
  offset = generator.random(3)
  highs = np.floor((order + 1) * target + offset) - np.floor(
    order * target + offset
  )
  upper = places < highs.reshape(*shape[:-1], 1, 3)
  return levels.pick(upper)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThresholdGoal:
  """Goal of a threshold controller.

  Attributes:
    thresholds: (W, R, 3); an axis takes its upper level where the score
      reaches it.
    lookup: (W, R, 8) int32, see `TwoLevels`.
  """

  thresholds: jax.Array
  lookup: jax.Array


# What thresholds are compared with, (W, R): how surprising the token just read
# was, the entropy of the logits that predicted it, and 1 - cosine of the two
# last hidden states.
SCORES: dict[str, Callable[[Observation], jax.Array]] = {
  "surprise": lambda seen: seen.scalars[..., 0],
  "entropy": lambda seen: seen.scalars[..., 1],
  "hidden drift": lambda seen: seen.drift,
}


@functools.cache
def threshold_controller() -> Controller:
  """Upper level on an axis where a score reaches its threshold.

  Returns:
    A controller with a `ThresholdGoal`. Its parameter is the place of the score
    in `SCORES`, so that all scores share a compiled program; it records the
    scores (W, R, 3).
  """

  def act(params, goal, carry, seen, key):
    del key
    score = jnp.stack([score(seen) for score in SCORES.values()])[params]
    scores = jnp.broadcast_to(score[..., None], (*score.shape, 3))
    upper = (scores >= goal.thresholds).astype(jnp.int32)
    corner = 4 * upper[..., 0] + 2 * upper[..., 1] + upper[..., 2]
    action = jnp.take_along_axis(goal.lookup, corner[..., None], axis=-1)
    return action[..., 0], carry, scores

  return Controller(start=lambda params, goal: (), act=act)
