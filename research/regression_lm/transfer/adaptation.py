"""Few numbers of one task, many of others: pretraining and adaptation.

All tasks are written as ranks in [0, 1) among what is known of them, with the
task's name in front of the text, so that one decoder serves all. Members of an
ensemble, seeds and targets are trained at once (`batched_training`).

Axis letters: M members, E members of an ensemble, G numbers of a grid.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.regression_lm import Params
from research.predictors import measures
from research.predictors.text_forms import Facts
from research.regression_lm import batched_training
from research.regression_lm.expected import Grid, Scale
from research.regression_lm.transfer.preparation import Builder, Prepared
from research.regression_lm.transfer.setup import (
  Found,
  Setup,
  Split,
  source_rows,
)

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
  """Members that learned the sources.

  Attributes:
    params: of groups * E members, a group's members side by side.
    groups: one for each seed, or one for all where rows do not differ.
    scales: of every source, by group.
  """

  params: Params
  groups: int
  scales: list[list[Scale]]


def pretrain(
  setup: Setup, facts: Facts, prepared: Prepared, parts: Sequence[Split],
  say: Say,
) -> Pretrained:  # fmt: skip
  """Trains on the sources, or begins at random where there are none."""
  groups = setup.seeds if setup.source_rows else 1
  seeds = [1000 + member for member in range(groups * setup.ensemble)]
  params = batched_training.init(
    prepared.model, batched_training.keys_of(seeds)
  )
  if not setup.sources:
    return Pretrained(params, groups, [[] for _ in range(groups)])
  builder = Builder(prepared)
  own, scales = [], []
  for group in range(groups):
    rows = source_rows(setup, facts, parts[group])
    found, fitted = [], []
    for place, task in enumerate(setup.sources):
      values = facts.column(task.column)[rows]
      there = np.isfinite(values)
      scale = Scale.fit("rank", values[:, None])
      ranks = scale.scores(values[there, None])[:, 0]
      found.append(builder.add(place, task.form, rows[there], ranks))
      fitted.append(scale)
    own += [np.concatenate(found)] * setup.ensemble
    scales.append(fitted)
  say(f"pretraining {len(own)} models on {len(own[0])} numbers")
  params = batched_training.train(
    prepared.model,
    params,
    prepared.pool,
    builder.pairs(),
    _many(prepared.grid, len(own)),
    own,
    setup.pretraining,
    seeds=seeds,
    say=say,
  )
  return Pretrained(params, groups, scales)


def _many(grid: Grid, count: int) -> Grid:
  return jax.tree.map(lambda x: jnp.stack([x] * count), grid)


def train(
  setup: Setup, facts: Facts, prepared: Prepared, parts: Sequence[Split],
  start: Pretrained, size: int, say: Say,
) -> dict[tuple[int, int], Found]:  # fmt: skip
  """Adapts to `size` examples of every target and seed, and predicts.

  Returns:
    (place of the target, seed) -> predictions.
  """
  builder = Builder(prepared)
  own, begins, seeds, tasks, rows, scales = [], [], [], [], [], []
  for place, task in enumerate(setup.targets):
    values = facts.column(task.column)
    for seed, split in enumerate(parts):
      known = split.known[:size]
      scale = Scale.fit("rank", values[known, None])
      ranks = scale.scores(values[known, None])[:, 0]
      name = _nearest(setup, facts, known, values[known])
      name = len(setup.sources) + place if name is None else name
      indices = builder.add(name, task.form, known, ranks)
      scales.append(scale)
      group = seed if start.groups > 1 else 0
      for member in range(setup.ensemble):
        own.append(indices)
        begins.append(group * setup.ensemble + member)
        seeds.append(1000 * seed + 100000 * place + member)
        tasks.append(name)
        rows.append(split.test + prepared.first[task.form])
  params = jax.tree.map(lambda x: x[np.array(begins)], start.params)
  if not setup.sources:  # Seeds begin at different weights.
    params = batched_training.init(
      prepared.model, batched_training.keys_of(seeds)
    )
  grids = _many(prepared.grid, len(own))
  say(f"{len(own)} models on {size} examples")
  params = batched_training.train(
    prepared.model, params, prepared.pool, builder.pairs(), grids, own,
    setup.training[size], seeds=seeds, say=say,
  )  # fmt: skip
  found = batched_training.chances(
    prepared.model, params, prepared.pool, grids, np.stack(rows),
    np.array(tasks), views=setup.test_views,
  )  # fmt: skip
  found = found.reshape(len(scales), setup.ensemble, *found.shape[1:]).mean(1)
  keys = [(p, s) for p in range(len(setup.targets)) for s in range(setup.seeds)]
  return {
    key: _found(prepared, part, scale)
    for key, part, scale in zip(keys, found, scales)
  }


def _nearest(setup, facts, rows, values) -> int | None:
  """The source most like the target on its examples, if any is alike.

  Its name is the target's (NASFLAT copies a device's embedding likewise).
  """
  best, place = 0.8, None
  for number, task in enumerate(setup.sources):
    others = facts.column(task.column)[rows]
    there = np.isfinite(others)
    alike = measures.spearman(others[there], values[there])
    if alike > best:
      best, place = alike, number
  return place


def _ranks(prepared: Prepared) -> np.ndarray:
  """Ranks (G,) of the grid's numbers."""
  return np.asarray(prepared.grid.scores[0], np.float64) / np.sqrt(12) + 0.5


def _found(prepared: Prepared, chances: np.ndarray, scale: Scale) -> Found:
  """Values of mean ranks and of all ranks, given chances (tests, G)."""
  ranks = _ranks(prepared)
  points = scale.values((chances @ ranks)[:, None])[:, 0]
  atoms = scale.values(ranks[:, None])[:, 0]
  return Found(points, np.broadcast_to(atoms, chances.shape), chances)


def source_values(
  setup: Setup, facts: Facts, prepared: Prepared, start: Pretrained,
  seed: int, rows: np.ndarray,
) -> np.ndarray:  # fmt: skip
  """What the pretrained members say of the sources, (rows, sources)."""
  group = seed if start.groups > 1 else 0
  part = slice(group * setup.ensemble, (group + 1) * setup.ensemble)
  params = jax.tree.map(lambda x: x[part], start.params)
  grids = _many(prepared.grid, setup.ensemble)
  columns = []
  for place, task in enumerate(setup.sources):
    texts = np.stack([rows + prepared.first[task.form]] * setup.ensemble)
    found = batched_training.chances(
      prepared.model, params, prepared.pool, grids, texts,
      np.full(setup.ensemble, place), views=setup.test_views,
    )  # fmt: skip
    ranks = found.mean(0) @ _ranks(prepared)
    columns.append(start.scales[group][place].values(ranks[:, None])[:, 0])
  return np.stack(columns, axis=1)
