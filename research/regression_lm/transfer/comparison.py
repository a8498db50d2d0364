"""Few numbers of one task, many of others: models and peers on the same rows.

All tasks are written as ranks in [0, 1) among what is known of them, with the
task's name in front of the text, so that one decoder serves all. Members of an
ensemble, seeds and targets are trained at once (`together`).

Axis letters: N rows, M members, E members of an ensemble, G numbers of a grid.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from models.numbers import Normalized, TargetCodec
from models.regression_lm import Params
from models.regression_lm_config import RegressionLMConfig
from research.predictors import measures
from research.predictors import text_forms as forms
from research.predictors.text_forms import Facts
from research.regression_lm import batched_training as together
from research.regression_lm.batched_training import Pairs, Pool, Updates
from research.regression_lm.expected import Grid, Scale
from research.regression_lm.likelihood import Model
from research.text import tokenizing

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A column to predict.

  Attributes:
    column: its name.
    form: text form that it is read from.
  """

  column: str
  form: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """What is compared.

  Attributes:
    targets: tasks with few numbers.
    sources: tasks with many; none trains from scratch.
    sizes: numbers of training examples.
    seeds: splits.
    tests: test rows at most, the same for all sizes.
    source_rows: rows whose source numbers are known, none of them tested; 0
      for all rows, tested ones among them.
    ensemble: E.
    views: orders of a text's fields in training.
    test_views: orders whose probabilities are averaged.
    size: changes of the config "tiny".
    vocab_size: of the BPE.
    max_length: tokens of a text.
    digits: decimal digits of a rank.
    grid: numbers that stand for all in expected values.
    pretraining: of the sources.
    training: by size, of the targets.
  """

  targets: Sequence[Task]
  sources: Sequence[Task] = ()
  sizes: Sequence[int]
  seeds: int = 3
  tests: int = 3000
  source_rows: int = 0
  ensemble: int = 8
  views: int = 8
  test_views: int = 4
  size: dict[str, int] = dataclasses.field(default_factory=dict)
  vocab_size: int = 512
  max_length: int = 128
  digits: int = 2
  grid: int = 33
  pretraining: Updates | None = None
  training: dict[int, Updates]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Rows of a seed: tested, and known in order; the first N are examples."""

  test: np.ndarray
  known: np.ndarray


def splits(setup: Setup, facts: Facts) -> list[Split]:
  """One for each seed.

  Raises:
    InputError: there are too few rows.
  """
  values = np.stack([facts.column(t.column) for t in setup.targets])
  there = np.flatnonzero(np.isfinite(values).all(axis=0))
  wanted = max(*setup.sizes, setup.source_rows, 2)
  count = min(setup.tests, len(there) - wanted)
  if count < 2:
    raise InputError(
      f"{len(there)} rows leave no test beside {wanted}: take smaller --sizes"
    )
  found = []
  for seed in range(setup.seeds):
    order = there[np.random.default_rng((seed, 31)).permutation(len(there))]
    found.append(Split(order[:count], order[count:]))
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Models and texts before training.

  Attributes:
    model: of all members.
    pool: texts of all forms, one form behind the other.
    first: form -> its first text in the pool.
    names: of tasks, in the pool's order.
    written: (numbers, T) ids of every number.
    grid: of expected values.
  """

  model: Model
  pool: Pool
  first: dict[str, int]
  names: list[str]
  written: np.ndarray
  grid: Grid


def prepare(setup: Setup, facts: Facts) -> Prepared:
  """Tokenizes all texts.

  The BPE is learned from the texts of all rows: they are the whole space, and
  no number is among them.
  """
  tasks = [*setup.sources, *setup.targets]
  used = list(dict.fromkeys(task.form for task in tasks))
  generator = np.random.default_rng(7)
  texts, first = [], {}
  for form in used:
    if form not in facts.forms:
      raise InputError(f"there is no form {form!r}, but {list(facts.forms)}")
    first[form] = len(texts)
    for fields in facts.forms[form]:
      texts.append(forms.views(fields, setup.views, generator))
  names = [f"{task.column.replace('_', ' ')} :" for task in tasks]
  plain = [several[0] for several in texts] + names * 100
  tokenizer = tokenizing.train_bpe(plain, setup.vocab_size)
  pool = Pool.read(tokenizer, texts, names, setup.max_length)
  codec = TargetCodec(format=Normalized(base=10, digits=setup.digits))
  config = RegressionLMConfig.named(
    "tiny",
    vocab_size=tokenizer.vocab_size,
    target_vocab_size=len(codec.tokens),
    target_length=codec.length,
    **setup.size,
  )
  count = 10**setup.digits
  ranks = np.arange(count) / count
  written = codec.encode([[rank] for rank in ranks])
  chosen = np.unique(np.linspace(0, count - 1, setup.grid).round().astype(int))
  grid = Grid(
    ids=jnp.asarray(written[chosen][None]),
    scores=jnp.asarray(_standard(ranks[chosen])[None]),
  )
  model = Model(config=config, codec=codec)
  return Prepared(model, pool, first, names, written, grid)


def _standard(ranks: np.ndarray) -> np.ndarray:
  """Ranks with mean 0 and spread 1, float32."""
  return ((ranks - 0.5) * np.sqrt(12)).astype(np.float32)


class Builder:
  """Gathers pairs of all members."""

  def __init__(self, prepared: Prepared):
    """Starts with none."""
    self._prepared, self._parts, self._count = prepared, [], 0

  def add(self, task: int, form: str, rows: np.ndarray, ranks: np.ndarray):
    """Adds the numbers of a task; the indices (len(rows),) of its pairs."""
    written = self._prepared.written
    place = np.minimum((ranks * len(written)).round(), len(written) - 1)
    self._parts.append(
      (
        rows + self._prepared.first[form],
        np.full(len(rows), task),
        written[place.astype(int)],
        _standard(ranks)[:, None],
      )
    )
    self._count += len(rows)
    return np.arange(self._count - len(rows), self._count)

  def pairs(self) -> Pairs:
    """All of them."""
    rows, tasks, targets, scores = map(np.concatenate, zip(*self._parts))
    ids = lambda x: jnp.asarray(x, jnp.int32)
    return Pairs(ids(rows), ids(tasks), ids(targets), jnp.asarray(scores))


def _many(grid: Grid, count: int) -> Grid:
  return jax.tree.map(lambda x: jnp.stack([x] * count), grid)


def source_rows(setup: Setup, facts: Facts, split: Split) -> np.ndarray:
  """Rows whose source numbers are known."""
  if setup.source_rows:
    return split.known[: setup.source_rows]
  return np.arange(len(next(iter(facts.columns.values()))))


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
  params = together.init(prepared.model, seeds)
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
  params = together.train(
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


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """Predictions of a method for one target, size and seed.

  Attributes:
    points: (tests,).
    draws: (tests, draws), quantiles of the distribution; points where a method
      has none.
  """

  points: np.ndarray
  draws: np.ndarray


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
    params = together.init(prepared.model, seeds)
  grids = _many(prepared.grid, len(own))
  say(f"{len(own)} models on {size} examples")
  params = together.train(
    prepared.model, params, prepared.pool, builder.pairs(), grids, own,
    setup.training[size], seeds=seeds, say=say,
  )  # fmt: skip
  found = together.chances(
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
  """Values of mean ranks and of quantiles, given chances (tests, G)."""
  ranks = _ranks(prepared)
  points = scale.values((chances @ ranks)[:, None])[:, 0]
  levels = (np.arange(32) + 0.5) / 32
  total = np.cumsum(chances, axis=1)
  at = (levels[None, :, None] > total[:, None]).sum(-1)
  drawn = ranks[np.minimum(at, len(ranks) - 1)]
  return Found(points, scale.values(drawn[..., None])[..., 0])


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
    found = together.chances(
      prepared.model, params, prepared.pool, grids, texts,
      np.full(setup.ensemble, place), views=setup.test_views,
    )  # fmt: skip
    ranks = found.mean(0) @ _ranks(prepared)
    columns.append(start.scales[group][place].values(ranks[:, None])[:, 0])
  return np.stack(columns, axis=1)
