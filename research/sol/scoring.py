"""Perplexity of controllers and schedules over a text, under refresh.

Axis letters: W windows, E episodes of a window, P operating points of a
series, T steps. Every token of the text is scored once (`windows.cover`);
every episode starts from the dense prefix, which is the published refresh.
All series of a batch of windows share its prefix.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research.core import intervals
from research.core import mesh as mesh_lib
from research.sol import rollout as rollout_lib
from research.sol.rollout import Controller, Setup
from research.sol.windows import Cover

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanSeries:
  """A controller at P operating points.

  Attributes:
    name: for tables and plots.
    controller: chooses the actions.
    params: its parameters.
    goals: pytree with leading axis P.
  """

  name: str
  controller: Controller
  params: Tree
  goals: Tree

  @property
  def points(self) -> int:
    """P."""
    return jax.tree.leaves(self.goals)[0].shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSeries:
  """Schedules that are fixed in advance.

  Attributes:
    name: for tables and plots.
    actions: (P, W, E, T) integers.
  """

  name: str
  actions: np.ndarray

  @property
  def points(self) -> int:
    """P."""
    return self.actions.shape[0]


@dataclasses.dataclass(frozen=True)
class Score:
  """What one operating point cost and gave, summed over scored tokens.

  Attributes:
    nll: (W, E) nats.
    spent: (W, E, 3 + C) sums of (kappa, rho, bits / 16) and of C further
      costs.
    tokens: (W, E) numbers of scored tokens.
    own: (W, E, T) log-likelihood of every token, or None.
  """

  nll: np.ndarray
  spent: np.ndarray
  tokens: np.ndarray
  own: np.ndarray | None = None

  @property
  def means(self) -> np.ndarray:
    """Mean (kappa, rho, bits / 16) a token (3,)."""
    return self.spent[..., :3].sum((0, 1)) / self.tokens.sum()

  @property
  def further(self) -> np.ndarray:
    """Mean of the further costs a token (C,)."""
    return self.spent[..., 3:].sum((0, 1)) / self.tokens.sum()

  @property
  def net_keep(self) -> float:
    """Published net keep rate: the mean of the three means."""
    return float(self.means.mean())

  @property
  def mean_nll(self) -> float:
    """Nats a token."""
    return float(self.nll.sum() / self.tokens.sum())

  @property
  def perplexity(self) -> float:
    """exp of the mean nll."""
    return float(np.exp(self.mean_nll))


def mix(low: Score, high: Score, share: float) -> Score:
  """The mixture that plays `high` on a `share` of the episodes, in the mean.

  A share outside [0, 1] extrapolates.
  """
  blend = lambda a, b: (1 - share) * a + share * b
  return Score(
    nll=blend(low.nll, high.nll),
    spent=blend(low.spent, high.spent),
    tokens=low.tokens,
  )


def at_cost(
  low: Score, high: Score, cost: float, of: Callable[[Score], float]
) -> Score:
  """Mixes two points of one baseline so that they spend `cost`.

  Args:
    low: the cheaper one.
    high: the dearer one.
    cost: what is to be spent.
    of: what a score spent.
  """
  width = of(high) - of(low)
  if abs(width) < 1e-6:
    return low
  share = (cost - of(low)) / width
  # The share is bounded, because a line says nothing far beyond its two points.
  return mix(low, high, float(np.clip(share, -1.0, 2.0)))


def paired_difference(
  ours: Score, other: Score, *, seed: int = 0
) -> intervals.Interval:
  """Mean nll of `ours` minus `other` a token, with a 95% interval.

  A paired bootstrap over windows, weighted by scored tokens.

  Raises:
    ValueError: a number is not finite.
  """
  delta = (ours.nll - other.nll).sum(1)
  return intervals.ratio(delta, ours.tokens.sum(1), seed=seed)


@functools.partial(jax.jit, static_argnums=(0, 5, 8))
def _scan(
  setup, params, prefix, tokens, starts, controller, inner, goals, episodes
):
  return rollout_lib.scan(
    setup,
    params,
    prefix,
    tokens,
    starts,
    rollout_lib.Play(controller=controller, params=inner, goal=goals),
    jax.random.key(0),
    episodes=episodes,
  )


_dense = jax.jit(rollout_lib.dense_hidden, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _block(setup, params, prefix, tokens, starts, actions, dense):
  """Points lie one after the other, (W, P E, T); `dense` is (W, E, T, D)."""
  episodes = starts.shape[1]
  count = actions.shape[1] // episodes

  def turned(x, outer):
    x = x.reshape(x.shape[0], outer, -1, *x.shape[2:])
    return x.swapaxes(1, 2).reshape(x.shape[0], -1, *x.shape[3:])

  # Side by side, the points of an episode share the dense model's logits.
  result = rollout_lib.score_block(
    setup,
    params,
    prefix,
    tokens,
    jnp.repeat(starts, count, axis=1),
    turned(actions, count),
    dense=dense,
  )
  return jax.tree.map(lambda x: turned(x, episodes), result)


def evaluate(
  setup: Setup,
  params: transformer.Params,
  cover: Cover,
  series: Sequence[ScanSeries | BlockSeries],
  *,
  window_batch: int,
  max_rows: int = 4096,
  keep_tokens: bool = False,
  divergence: bool = False,
  further_costs: np.ndarray | None = None,
  progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, list[Score]]:
  """Scores all series on a cover, whose episodes begin with a refresh.

  Where those of the cover are a multiple of the set-up's in length, they go on
  without one, see `rollout.scan` and `windows.unbroken`.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    cover: the text.
    series: what to score; names are unique.
    window_batch: windows whose prefix is alive at a time.
    max_rows: rollouts (windows x episodes x points) of one call.
    keep_tokens: keep every token's log-likelihood.
    divergence: score the divergence from the dense model (KL) instead of the
      true tokens' nll; for schedules alone.
    further_costs: (A, C) costs of each action to sum up too.
    progress: called with the number of tokens that were just scored, counted
      once a series and point.

  Returns:
    A list of P scores for each series' name.
  """
  table = np.stack(
    [setup.table.kappa, setup.table.rho, np.asarray(setup.table.bits) / 16],
    axis=1,
  )
  if further_costs is not None:
    table = np.concatenate([table, further_costs], axis=1)
  out = {one.name: [[] for _ in range(one.points)] for one in series}
  episodes = cover.starts.shape[1]
  window_batch = min(window_batch, cover.num_windows)
  first_start = int(cover.starts.min())
  prefix_length = int(cover.starts.max())
  for at in range(0, cover.num_windows, window_batch):
    rows = np.arange(at, at + window_batch)
    real = rows < cover.num_windows
    rows = np.where(real, rows, 0)
    part = cover.take(rows)
    weights = part.weights * real[:, None, None]
    tokens = jnp.asarray(part.tokens)
    prefix = setup.build_prefix(
      params, tokens[:, : prefix_length + 1], first_start
    )
    dense = None
    if divergence:
      # The dense model reads every episode once, whatever the number of points.
      dense = _dense(setup, params, prefix, tokens, jnp.asarray(part.starts))
    for one in series:
      step = max(max_rows // (window_batch * episodes), 1)
      for first in range(0, one.points, step):
        points = range(first, min(first + step, one.points))
        result = _run(
          setup, params, prefix, tokens, part, one, points, rows, dense
        )
        rewards, actions = mesh_lib.to_host((result.rewards, result.actions))
        for i, point in enumerate(points):
          own = slice(i * episodes, (i + 1) * episodes)
          log_p = np.asarray(rewards[:, own], np.float64)
          spent = table[np.asarray(actions[:, own])]
          score = _score(log_p, spent, weights, real, keep_tokens)
          out[one.name][point].append(score)
        progress(int(weights.sum()) * len(points))
  return {
    name: [_join(pieces) for pieces in points] for name, points in out.items()
  }


def _score(log_p, spent, weights, real, keep_tokens: bool) -> Score:
  """The score of steps (W, E, T), in those windows that are `real` (W,)."""
  return Score(
    nll=-(log_p * weights).sum(-1)[real],
    spent=(spent * weights[..., None]).sum(2)[real],
    tokens=weights.sum(-1)[real],
    own=log_p[real].astype(np.float32) if keep_tokens else None,
  )


def _run(setup, params, prefix, tokens, part, one, points, rows, dense):
  """One series at some of its points: rollouts (W, len(points) E, T)."""
  if isinstance(one, BlockSeries):
    actions = one.actions[points.start : points.stop, rows]
    actions = np.concatenate(list(actions), axis=1).astype(np.int32)
    return _block(
      setup,
      params,
      prefix,
      tokens,
      jnp.asarray(part.starts),
      jnp.asarray(actions),
      dense,
    )
  windows, episodes = part.starts.shape
  starts = jnp.asarray(np.tile(part.starts, (1, len(points))))

  def spread(x):
    x = jnp.asarray(x)[points.start : points.stop]
    x = jnp.repeat(x, episodes, axis=0)[None]
    return jnp.broadcast_to(x, (windows, *x.shape[1:]))

  goals = jax.tree.map(spread, one.goals)
  return _scan(
    setup,
    params,
    prefix,
    tokens,
    starts,
    one.controller,
    one.params,
    goals,
    part.weights.shape[2] // setup.horizon,
  )


def _join(pieces: Sequence[Score]) -> Score:
  own = None
  if pieces[0].own is not None:
    own = np.concatenate([p.own for p in pieces])
  return Score(
    nll=np.concatenate([p.nll for p in pieces]),
    spent=np.concatenate([p.spent for p in pieces]),
    tokens=np.concatenate([p.tokens for p in pieces]),
    own=own,
  )
