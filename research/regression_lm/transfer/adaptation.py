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
from research.regression_lm.transfer import setup as transfer_setup
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

  With folds, as many models more learn the examples without one of them, and
  predict it.

  Returns:
    (place of the target, seed) -> predictions.
  """
  builder = Builder(prepared)
  own, begins, seeds, tasks, fits = [], [], [], [], []
  sources = [
    _of_sources(setup, facts, prepared, start, seed, split.known[:size])
    for seed, split in enumerate(parts)
  ]
  for place, task in enumerate(setup.targets):
    values = facts.column(task.column)
    for seed, split in enumerate(parts):
      examples = split.known[:size]
      folds = transfer_setup.folds(setup, size, seed)
      for held in [None, *folds]:
        known = examples if held is None else np.delete(examples, held)
        scale = Scale.fit("rank", values[known, None])
        ranks = scale.scores(values[known, None])[:, 0]
        rest = np.isin(examples, known)
        name = _nearest(sources[seed][rest], values[known])
        name = len(setup.sources) + place if name is None else name
        indices = builder.add(name, task.form, known, ranks)
        asked = split.test if held is None else examples[held]
        asked = asked + prepared.first[task.form]
        fits.append(_Fit((place, seed), held, asked, scale))
        group = seed if start.groups > 1 else 0
        for member in range(setup.ensemble):
          own.append(indices)
          begins.append(group * setup.ensemble + member)
          seeds.append(1000 * seed + 100000 * place + member)
          tasks.append(name)
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
  tests = [place for place, fit in enumerate(fits) if fit.held is None]
  held = [place for place, fit in enumerate(fits) if fit.held is not None]
  found = {}
  for places in filter(None, (tests, held)):
    found |= _asked(setup, prepared, params, grids, tasks, fits, places)
  done = {}
  for place in tests:
    key = fits[place].key
    own = [place for place in held if fits[place].key == key]
    parts = [found[place] for place in own]
    joined = Found.joined(parts, [fits[p].held for p in own]) if own else None
    done[key] = dataclasses.replace(found[place], held=joined)
  return done


@dataclasses.dataclass(frozen=True, eq=False)
class _Fit:
  """Members that learn the same numbers, and what they are asked.

  Attributes:
    key: place of the target, and seed.
    held: places of the examples that they do not learn; None where they learn
      all and are asked the test rows.
    asked: texts in the pool.
    scale: of the numbers that they learn.
  """

  key: tuple[int, int]
  held: np.ndarray | None
  asked: np.ndarray
  scale: Scale


def _asked(
  setup, prepared, params, grids, tasks, fits, places
) -> dict[int, Found]:
  """Answers of some fits by their place; asked texts differ in number."""
  size = setup.ensemble
  most = max(len(fits[place].asked) for place in places)
  rows = [np.resize(fits[place].asked, most) for place in places]
  members = np.concatenate(
    [np.arange(p * size, (p + 1) * size) for p in places]
  )
  take = lambda tree: jax.tree.map(lambda x: x[members], tree)
  chances = batched_training.chances(
    prepared.model, take(params), prepared.pool, take(grids),
    np.repeat(rows, size, axis=0), np.array(tasks)[members],
    views=setup.test_views, batch=min(most, 256),
  )  # fmt: skip
  chances = chances.reshape(len(places), size, *chances.shape[1:]).mean(1)
  return {
    place: _found(prepared, part[: len(fits[place].asked)], fits[place].scale)
    for place, part in zip(places, chances)
  }


def _of_sources(
  setup, facts, prepared, start: Pretrained, seed: int, rows: np.ndarray
) -> np.ndarray:
  """Numbers of the sources (rows, sources), NaN where they are missing.

  Where rows have none at all, since the sources are of other rows, they are
  what the pretrained members say.
  """
  if not setup.sources:
    return np.zeros((len(rows), 0))
  columns = [facts.column(task.column)[rows] for task in setup.sources]
  known = np.stack(columns, axis=1)
  if np.isfinite(known).any():
    return known
  return source_values(setup, prepared, start, seed, rows)


def _nearest(sources: np.ndarray, values: np.ndarray) -> int | None:
  """The source most like the target on its examples, if any is alike.

  Its name is the target's (NASFLAT copies a device's embedding likewise).
  """
  best, place = 0.8, None
  for number, others in enumerate(sources.T):
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
  setup: Setup, prepared: Prepared, start: Pretrained, seed: int,
  rows: np.ndarray,
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
